"""What fewer bits cost and bring: right answers of ouro-mini and decode speed, in one run.

    python -m benchmarks.bits [--problems 50] [--model mid] [--batches 1 8 32] [--rounds 3]

Every format is written by `ouro_runtime.model.quantize`. Answers come from the served engine; of a
format that this machine's vLLM does not run, from the PyTorch reference over weights rounded as the
format rounds them, and such rows say so. Speed is the engine's alone, the formats in turn on the
same cores. Writes `bits.json` into `benchmarks/results/` and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.decode import RESULTS, forced, make_model, tokens_for
from benchmarks.engines import MINI, Engine, choose_dtype, machine, worker_cores
from benchmarks.report import print_table
from benchmarks.workload import PROMPT, prompts

PLAIN = "as stored"
FORMATS: dict[str, list[str]] = {
    PLAIN: [],
    "w8a8": ["--format", "w8a8"],
    "w4a16": ["--format", "w4a16", "--group-size", "32"],
}
MEANS = (4.0, 2.5)


def runnable() -> tuple[bool, bool]:
    """Whether this machine's vLLM runs 4 bits, and whether 8 bits must be narrow. In a process of
    its own: vLLM is imported."""
    from ouro_runtime.model.quantized import has_four_bits, overflows

    return has_four_bits(), overflows()


def write(model: Path, folder: Path, options: list[str], narrow: bool) -> Path:
    """`model` in a format; `model` itself for the one that is stored."""
    from ouro_runtime.model.quantize import main

    if not options:
        return model
    extra = ["--narrow"] if narrow and "w8a8" in options else []
    assert main([str(model), str(folder), *options, *extra]) == 0
    return folder


def answers(model: Path, name: str, served: bool, problems: int) -> list[dict[str, Any]]:
    """Right answers in every mode; in a process of its own."""
    from benchmarks.quality import SHIPPED, EngineBackend, ReferenceBackend, measure
    from ouro_runtime.training.evaluate import Setting
    from ouro_runtime.training.export import load
    from ouro_runtime.training.reference import Controls

    modes = {"full": Controls()}
    modes |= {mode: Controls(0.5, exit_mode=mode) for mode in ("skip", "exact")}
    if served:
        modes["lossless"] = Controls(0.5, exit_mode="lossless")
        backend: Any = EngineBackend(model, "bfloat16" if name == "w4a16" else "float32")
    else:
        model = as_plain(model)
        backend = ReferenceBackend(model, {})
    lm, tok = load(MINI if served else model)
    settings = [Setting(SHIPPED, control) for control in modes.values()]
    return [
        {
            "format": name,
            "backend": backend.name,
            "mode": mode,
            "right": result.total().accuracy,
            "mean_depth": result.total().depth,
        }
        for mode, result in zip(
            modes, measure(settings, backend, problems, tok, lm.cfg.loops), strict=True
        )
    ]


def as_plain(model: Path) -> Path:
    """A quantized checkpoint beside itself, with plain weights that are rounded alike."""
    from safetensors.torch import save_file

    from ouro_runtime.model.quantize import unpacked

    folder = model.with_name(model.name + "-plain")
    folder.mkdir()
    for file in MINI.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "model.safetensors").unlink()
    save_file(unpacked(model), folder / "model.safetensors", {"format": "pt"})
    return folder


def speeds(
    models: dict[str, Path], dtype: str, batches: Sequence[int], rounds: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Median decode rates, tokens a second of the whole batch, and the machine."""
    rates: dict[tuple[str, int, float], list[float]] = {}
    with ExitStack() as stack:
        engines = {}
        for name, model in models.items():
            precision = "bfloat16" if name == "w4a16" else dtype
            one = Engine("ours", model, worker_cores(), "--dtype", precision)
            engines[name] = stack.enter_context(one)
        vocab = json.loads((models[PLAIN] / "config.json").read_text())["vocab_size"]
        for turn in range(-1, rounds):
            for batch in batches:
                tokens = tokens_for(batch)
                for mean in MEANS:
                    for name, engine in engines.items():
                        found = engine.ask(
                            "decode",
                            prompts=prompts(batch, PROMPT, vocab, seed=batch),
                            tokens=tokens + 1,
                            extra=forced(mean, tokens, batch),
                        )
                        if turn >= 0:
                            rates.setdefault((name, batch, mean), []).append(found["rate"])
        where = machine(engines[PLAIN])
    rows = [
        {"format": name, "batch": batch, "mean_depth": mean, "rate": statistics.median(values)}
        for (name, batch, mean), values in rates.items()
    ]
    return rows, where


def alone(function: Any, *arguments: Any) -> Any:
    """The result of a function in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=50, help="per family and difficulty")
    parser.add_argument("--model", default="mid", help="whose speed: a preset's name or a folder")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    four_bits, narrow = alone(runnable)
    result: dict[str, Any] = {
        "four_bits": four_bits,
        "narrow": narrow,
        "problems": options.problems,
    }
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        result["answers"] = []
        for name, how in FORMATS.items():
            model = alone(write, MINI, scratch / f"mini-{name}", how, narrow)
            served = name != "w4a16" or four_bits
            result["answers"] += alone(answers, model, name, served, options.problems)
        if options.batches:
            source = make_model(options.model, scratch / "source")
            dtype = choose_dtype("auto", source)
            models = {
                name: alone(write, source, scratch / f"speed-{name}", how, narrow)
                for name, how in FORMATS.items()
                if name != "w4a16" or four_bits
            }
            rows, where = speeds(models, dtype, options.batches, options.rounds)
            result |= {"speed": rows, "model": options.model, "dtype": dtype, "machine": where}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bits.json").write_text(json.dumps(result, indent=1) + "\n")
    for part, columns in (
        ("answers", ("format", "backend", "mode", "right", "mean_depth")),
        ("speed", ("format", "batch", "mean_depth", "rate")),
    ):
        cells = [[row[column] for column in columns] for row in result.get(part, [])]
        print_table(
            columns, [[f"{x:.2f}" if isinstance(x, float) else x for x in row] for row in cells]
        )


if __name__ == "__main__":
    main()
