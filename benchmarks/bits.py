"""What fewer bits cost and bring: right answers of ouro-mini and decode speed, in one run.

    python -m benchmarks.bits [--problems 50] [--model mid] [--batches 1 8 32] [--rounds 3]

Every format is written by `ouro_runtime.model.quantize`. Answers come from the served engine; of a
format that this machine's vLLM does not run, from the PyTorch reference over weights rounded as the
format rounds them, and such rows say so. Speed is the engine's alone, the formats in turn on the
same cores; a checkpoint of 16 bits is measured in 32 too where the processor has no arithmetic for
16. `--problems 0` or no batches leave a part out. Writes `bits.json` and `bits.md` into
`benchmarks/results/` (`--name` names others).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.decode import RESULTS, forced, make_model, tokens_for
from benchmarks.engines import MINI, Engine, choose_dtype, machine, worker_cores
from benchmarks.workload import PROMPT, prompts

PLAIN = "as stored"
FORMATS: dict[str, list[str]] = {
    PLAIN: [],
    "w8a8": ["--format", "w8a8"],
    "w4a16": ["--format", "w4a16", "--group-size", "32"],
}
BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


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
    """Right answers in every mode; in a process of its own, and the engine in that: one of its own
    would not let it end."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
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


def contenders(source: Path, written: dict[str, Path]) -> dict[str, tuple[Path, str]]:
    """Whose speed is measured: label -> checkpoint, and what the engine computes in.

    Args:
        source: the checkpoint as stored. written: that of every format that runs here.
    """
    stored = json.loads((source / "config.json").read_text())["torch_dtype"]
    here = choose_dtype("auto", source)
    found = {f"{PLAIN}, {BITS[here]} bits": (source, here)}
    if here != stored:
        found[f"{PLAIN}, {BITS[stored]} bits"] = (source, stored)
    for name, model in written.items():
        # The kernels of 4 bits compute in 16.
        found[name] = (model, "bfloat16" if name == "w4a16" else here)
    return found


def speeds(
    models: dict[str, tuple[Path, str]],
    batches: Sequence[int],
    means: Sequence[float],
    rounds: int,
    tokens: int | None,
    keep: Callable[[list[dict[str, Any]], dict[str, Any]], None],
) -> None:
    """Median decode rates, tokens a second of the whole batch.

    Args:
        models: see `contenders`. means: mean depths.
        tokens: of each request, a multiple of 16 below full depth; None for `decode`'s.
        keep: gets a row for each setting, and the machine, after every round but the first, which
            warms up. A run that is ended early so leaves its figures.
    """
    rates: dict[tuple[str, int, float], list[float]] = {}
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(
                Engine("ours", model, worker_cores(), "--dtype", dtype, "--max-num-seqs", "32")
            )
            for name, (model, dtype) in models.items()
        }
        model, _ = next(iter(models.values()))
        vocab = json.loads((model / "config.json").read_text())["vocab_size"]
        for turn in range(-1, rounds):
            for batch in batches:
                count = tokens or tokens_for(batch)
                for mean in means:
                    for name, engine in engines.items():
                        found = engine.ask(
                            "decode",
                            prompts=prompts(batch, PROMPT, vocab, seed=batch),
                            tokens=count + 1,
                            extra=forced(mean, count, batch),
                        )
                        rate = found["rate"]
                        print(
                            f"round {turn + 1}, {batch}, {mean:g}, {name}: {rate:.1f}", flush=True
                        )
                        if turn >= 0:
                            rates.setdefault((name, batch, mean), []).append(rate)
            if rates:
                rows = [
                    {
                        "format": name,
                        "computes_in": models[name][1],
                        "batch": batch,
                        "mean_depth": mean,
                        "rate": statistics.median(values),
                        "rounds": values,
                    }
                    for (name, batch, mean), values in rates.items()
                ]
                keep(rows, machine(next(iter(engines.values()))))


def alone(function: Any, *arguments: Any) -> Any:
    """The result of a function in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def page(result: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    from benchmarks.quality import table

    lines = []
    if result["answers"]:
        head = ("format", "from", "mode", "right, %", "mean depth")
        cells = [
            (r["format"], r["backend"], r["mode"], f"{r['right']:.1f}", f"{r['mean_depth']:.2f}")
            for r in result["answers"]
        ]
        total = result["problems"]
        lines += [
            f"ouro-mini, {total} held-out problems per family and difficulty",
            "",
            table(head, cells),
        ]
    if result.get("speed"):
        rates = {(r["format"], r["mean_depth"], r["batch"]): r["rate"] for r in result["speed"]}
        batches = sorted({batch for _, _, batch in rates})
        rows = list(dict.fromkeys((name, mean) for name, mean, _ in rates))
        cells = [
            (name, f"{mean:g}", *(f"{rates[name, mean, batch]:.1f}" for batch in batches))
            for name, mean in rows
        ]
        where = result["machine"]
        rounds = len(result["speed"][0]["rounds"])
        said = (
            f"`{result['model']}`, tokens a second of the whole batch, decode only, medians of "
            f"{rounds} round(s); {where['cpu']}, {where['threads']} thread(s); vLLM "
            f"{where['vllm']}, torch {where['torch']}; load {where['load_at_start']} at the end"
        )
        columns = ("format", "mean depth", *(f"batch {batch}" for batch in batches))
        lines += [*([""] if lines else []), said, "", table(columns, cells)]
        if not result["four_bits"]:
            lines += ["", "4 bits have no kernel on this processor: vLLM's needs AVX-512."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=50, help="per family and difficulty")
    parser.add_argument("--model", default="mid", help="whose speed: a preset's name or a folder")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--means", type=float, nargs="+", default=[4.0, 2.5], help="mean depths")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--native", action="store_true", help="only what the processor has arithmetic for"
    )
    parser.add_argument("--tokens", type=int, help="of each request (default: 32, 16 in a batch)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="bits", help="of the files (bits)")
    options = parser.parse_args()
    four_bits, narrow = alone(runnable)
    result: dict[str, Any] = {
        "four_bits": four_bits,
        "narrow": narrow,
        "problems": options.problems,
        "answers": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)

    def keep(**more: Any) -> None:
        result.update(more)
        (options.out / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / f"{options.name}.md").write_text(page(result))

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name, how in FORMATS.items() if options.problems else ():
            model = alone(write, MINI, scratch / f"mini-{name}", how, narrow)
            served = name != "w4a16" or four_bits
            rows = alone(answers, model, name, served, options.problems)
            keep(answers=result["answers"] + rows)
        if options.batches:
            source = make_model(options.model, scratch / "source")
            written = {
                name: alone(write, source, scratch / f"speed-{name}", how, narrow)
                for name, how in FORMATS.items()
                if how and (name != "w4a16" or four_bits)
            }
            models = contenders(source, written)
            if options.native:
                models = {n: m for n, m in models.items() if m[1] == choose_dtype("auto", source)}
            speeds(
                models,
                options.batches,
                options.means,
                options.rounds,
                options.tokens,
                lambda rows, where: keep(speed=rows, model=options.model, machine=where),
            )
    print(page(result))


if __name__ == "__main__":
    main()
