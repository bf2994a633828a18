"""Decode speed on a GPU: `make gpu-bench`, or `python -m benchmarks.gpu`.

First the golden checkpoints in float32, whose greedy tokens must come out as recorded. Then
Ouro-1.4B's shape with random bf16 weights: decode tokens/s by batch and context, at full depth and
at forced mean depths, beside the stock model of `benchmarks.baseline` on the same GPU. Ends inside
nine minutes: what does not fit any more is named in the result. Writes
`benchmarks/results/gpu-<name>.json`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import PRESETS

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 510
"""Seconds after which nothing new is begun."""

BATCHES = (1, 8, 32, 128)
CONTEXTS = (128, 1024)
MEANS = (4.0, 2.5, 1.5)
SAFE = 5e-3
"""Golden cases with a closer decision are not held against another order of summation."""


class Child:
    """A process that holds one engine (`benchmarks.gpu_worker`); JSON lines in and out."""

    def __init__(self, kind: str, folder: str) -> None:
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

    def ask(self, **request: Any) -> Any:
        """One request, one reply. Raises RuntimeError if the process is gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the engine died while asked for {request.get('command')}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def roofline(bandwidth: float, mean: float) -> float:
    """Tokens/s of one sequence if nothing but the weights of its loops had to be read, once."""
    c = PRESETS["ouro-1.4b"]
    hidden, inner, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    loop = 2 * layers * (4 * hidden * hidden + 3 * hidden * inner)
    return bandwidth / (mean * loop + 2 * hidden * c["vocab_size"])


def golden(result: dict[str, Any]) -> bool:
    """Greedy tokens and depths of the golden checkpoints, in float32. False: they differ."""
    folder = ROOT / "tests" / "golden"
    for name in ("t4-mha", "t6-gqa"):
        records = json.loads((folder / name / "golden.json").read_text())["records"]
        cases, wanted = [], []
        for record in records:
            runs: list[tuple[dict[str, Any], Any]] = [({"exit_threshold": 1.0}, record["full"])]
            for mode in ("skip", "exact"):
                for threshold, run in record[mode].items():
                    fields: dict[str, Any] = {"exit_threshold": float(threshold), "exit_mode": mode}
                    runs.append((fields, run))
            for fields, run in runs:
                if min(run["min_logit_margin"], run["min_cdf_margin"]) >= SAFE:
                    cases.append([record["prompt"], len(run["tokens"]), fields])
                    wanted.append([run["tokens"], run["depths"]])
        child = Child("golden", str(folder / name))
        try:
            got = child.ask(command="generate", cases=cases)
        finally:
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


def measure(kind: str, folder: str, result: dict[str, Any], deadline: float) -> None:
    """All rows of one engine, cheapest first."""
    child = Child(kind, folder)
    try:
        result["machine"] = child.ask(command="describe")
        bandwidth = result["machine"]["copy_bytes_per_second"]
        child.ask(command="decode", batch=8, context=128, mean=4.0, forced=kind == "ours")
        for context in CONTEXTS:
            for batch in BATCHES:
                for mean in MEANS if kind == "ours" else (4.0,):
                    row: dict[str, Any] = {"engine": kind, "batch": batch, "context": context}
                    row["depth"] = mean
                    if time.monotonic() > deadline:
                        row["skipped"] = "out of time"
                    else:
                        row |= child.ask(
                            command="decode",
                            batch=batch,
                            context=context,
                            mean=mean,
                            forced=kind == "ours" and mean < 4,
                        )
                    if batch == 1 and "rate" in row:
                        row["of_roofline"] = row["rate"] / roofline(bandwidth, mean)
                    result["rows"].append(row)
                    print(json.dumps(row), flush=True)
    finally:
        child.close()


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


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("No CUDA device: the GPU benchmark needs one.")
        return 1
    deadline = time.monotonic() + LIMIT
    result: dict[str, Any] = {"golden": {}, "rows": []}
    if not golden(result):
        print("Tokens differ from the golden data: nothing is measured.")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder))
        # Ours may use all the time but what the baseline's eight rows take.
        measure("ours", folder, result, deadline - 130)
        measure("baseline", folder, result, deadline)
    compare(result["rows"])
    name = re.sub(r"[^a-z0-9]+", "-", result["machine"]["gpu"].lower()).strip("-")
    path = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
