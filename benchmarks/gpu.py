"""Everything that is measured on a GPU: `make gpu-bench`, or `python -m benchmarks.gpu`.

- `golden`: the golden checkpoints in float32, whose greedy tokens must come out as recorded. If
  they do not, nothing else is measured.
- `decode`: Ouro-1.4B's shape with random bf16 weights: decode tokens/s by batch and context, at
  full depth and at forced mean depths, beside the stock model of `benchmarks.baseline` on the same
  GPU. Written to `benchmarks/results/gpu-<name>.json`.
- `kernels`: `benchmarks.kernels`, which writes a file of its own.

All engines start at once and share the GPU's memory, since loading and compiling is most of the
time; one of them works at a time. Ends inside nine minutes, or `--seconds`, whatever happens:
nothing is begun in the last `CLOSING` of them, what still runs at the end is killed, and what was
left out is named.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import PRESETS

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
PARTS = ("golden", "decode", "kernels")
SECONDS, CLOSING = 525, 45
"""Seconds for all, and those at the end in which no row is begun."""

BATCHES = (1, 8, 32, 128)
CONTEXTS = (128, 1024)
MEANS = (4.0, 2.5, 1.5)
SAFE = 5e-3
"""Golden cases with a closer decision are not held against another order of summation."""


class EngineGoneError(RuntimeError):
    """The process that held the engine has ended, or was killed because its time was up."""


class Child:
    """A process that holds one engine (`benchmarks.gpu_worker`); JSON lines in and out.

    Args:
        end: when it is killed, on the clock of `time.monotonic`.
    """

    def __init__(self, kind: str, folder: str, end: float) -> None:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "VLLM_NO_USAGE_STATS": "1",
        }
        if kind == "baseline":
            environment["VLLM_PLUGINS"] = ""
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_worker"]
        self.process = subprocess.Popen(
            [*command, "--engine", kind, "--model", folder],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._killer = threading.Timer(max(0.0, end - time.monotonic()), self.process.kill)
        self._killer.daemon = True
        self._killer.start()

    def ask(self, **request: Any) -> Any:
        """One request, one reply. Raises EngineGoneError if the process is gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineGoneError(f"the engine was gone when asked for {request.get('command')}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        if not self.process.stdin.closed:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        finally:
            self._killer.cancel()


def roofline(bandwidth: float, mean: float) -> float:
    """Tokens/s of one sequence if nothing but the weights of its loops had to be read, once."""
    c = PRESETS["ouro-1.4b"]
    hidden, inner, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    loop = 2 * layers * (4 * hidden * hidden + 3 * hidden * inner)
    return bandwidth / (mean * loop + 2 * hidden * c["vocab_size"])


def golden(children: dict[str, Child], result: dict[str, Any]) -> bool:
    """Greedy tokens and depths of the golden checkpoints, in float32. False: they differ."""
    for name, child in children.items():
        records = json.loads((GOLDEN / name / "golden.json").read_text())["records"]
        cases, wanted = [], []
        for record in records:
            full = {"exit_threshold": 1.0, "exit_mode": "skip"}
            runs: list[tuple[dict[str, Any], Any]] = [(full, record["full"])]
            for mode in ("skip", "exact"):
                for threshold, run in record[mode].items():
                    fields: dict[str, Any] = {"exit_threshold": float(threshold), "exit_mode": mode}
                    runs.append((fields, run))
            for fields, run in runs:
                if min(run["min_logit_margin"], run["min_cdf_margin"]) >= SAFE:
                    cases.append([record["prompt"], len(run["tokens"]), fields])
                    wanted.append([run["tokens"], run["depths"]])
        got = child.ask(command="generate", cases=cases)
        child.close()
        wrong = sum(a != b for a, b in zip(got, wanted, strict=True))
        result["golden"][name] = {"cases": len(cases), "wrong": wrong}
        print(f"golden {name}: {len(cases) - wrong} of {len(cases)} cases right", flush=True)
        if wrong:
            return False
    return True


def write_config(folder: Path) -> None:
    """A checkpoint folder without weights: the engines make up their own."""
    preset = dict(PRESETS["ouro-1.4b"])
    config = {
        "architectures": ["OuroForCausalLM"],
        "model_type": "ouro",
        **preset,
        "num_key_value_heads": preset["num_attention_heads"],
        "head_dim": preset["hidden_size"] // preset["num_attention_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "total_ut_steps": 4,
        "early_exit_threshold": 1.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def measure(children: dict[str, Child], result: dict[str, Any], begin: float) -> None:
    """All rows, the engines in turn, cheapest first; those not begun until `begin` are skipped."""
    for kind, child in list(children.items()):
        with whole(kind, children, result):
            result["machine"] |= child.ask(command="describe")
            child.ask(command="decode", batch=8, context=128, mean=4.0, forced=kind == "ours")
    places = [(context, batch) for context in CONTEXTS for batch in BATCHES]
    for (context, batch), kind in itertools.product(places, list(children)):
        for mean in MEANS if kind == "ours" else (4.0,):
            row: dict[str, Any] = {"engine": kind, "batch": batch, "context": context}
            row["depth"] = mean
            result["rows"].append(row)
            if kind not in children or time.monotonic() > begin:
                row["skipped"] = "out of time" if kind in children else "the engine is gone"
                continue
            with whole(kind, children, result):
                row |= children[kind].ask(
                    command="decode",
                    batch=batch,
                    context=context,
                    mean=mean,
                    forced=kind == "ours" and mean < 4,
                )
            if batch == 1 and "rate" in row:
                bandwidth = result["machine"]["copy_bytes_per_second"]
                row["of_roofline"] = row["rate"] / roofline(bandwidth, mean)
            print(json.dumps(row), flush=True)


@contextlib.contextmanager
def whole(kind: str, children: dict[str, Child], result: dict[str, Any]) -> Iterator[None]:
    """An engine that goes in here is not asked again, and the result says so."""
    try:
        yield
    except EngineGoneError as error:
        del children[kind]
        result["stopped"].append(f"{kind}: {error}")
        print(result["stopped"][-1], flush=True)


def compare(rows: list[dict[str, Any]]) -> None:
    """Add, to each row of ours, its gain over the baseline and over our own full depth."""
    full = {
        (r["engine"], r["batch"], r["context"]): r["rate"]
        for r in rows
        if r["depth"] == 4 and "rate" in r
    }
    for row in rows:
        if row["engine"] != "ours" or "rate" not in row:
            continue
        place = row["batch"], row["context"]
        if ("baseline", *place) in full:
            row["over_baseline"] = row["rate"] / full["baseline", *place]
        if ("ours", *place) in full:
            row["of_bound"] = row["rate"] / full["ours", *place] / (4 / row["depth"])


def decode(children: dict[str, Child], result: dict[str, Any], begin: float) -> None:
    """Measure both engines, and write what there is."""
    measure(children, result, begin)
    compare(result["rows"])
    gpu = result["machine"].get("gpu", "unknown")
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}", flush=True)


def kernels(end: float) -> bool:
    """Time the kernels until `end`; False if one disagrees with its reference, or time is up."""
    left = end - time.monotonic()
    # The slowest case begun last still has to end.
    command = [sys.executable, "-m", "benchmarks.kernels", "--seconds", f"{left - 15:.0f}"]
    if left > 30:
        try:
            return subprocess.run(command, cwd=ROOT, timeout=left).returncode == 0
        except subprocess.TimeoutExpired:
            pass
    print("Out of time for the kernels: make gpu-bench ARGS='--parts kernels'")
    return False


def main(arguments: list[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"for all; default {SECONDS}")
    options = parser.parse_args(arguments)
    parts = options.parts
    if not torch.cuda.is_available():
        print("No CUDA device: the GPU benchmark needs one.")
        return 1
    end = time.monotonic() + options.seconds
    result: dict[str, Any] = {"golden": {}, "machine": {}, "rows": [], "stopped": []}
    with contextlib.ExitStack() as stack:

        def start_child(kind: str, folder: str) -> Child:
            return stack.enter_context(contextlib.closing(Child(kind, folder, end)))

        engines, checked = {}, {}
        if "golden" in parts:
            checked = {n: start_child("golden", str(GOLDEN / n)) for n in ("t4-mha", "t6-gqa")}
        if "decode" in parts:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            write_config(Path(folder))
            engines = {kind: start_child(kind, folder) for kind in ("ours", "baseline")}
        try:
            right = golden(checked, result)
        except EngineGoneError as error:
            print(f"golden: {error}")
            return 1
        if not right:
            print("Tokens differ from the golden data: nothing is measured.")
            return 1
        if engines:
            decode(engines, result, end - CLOSING)
    agreed = "kernels" not in parts or kernels(end)
    return 0 if agreed and not result["stopped"] else 1


if __name__ == "__main__":
    sys.exit(main())
