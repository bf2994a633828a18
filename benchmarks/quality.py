"""`make quality`: accuracy of a checkpoint by family, difficulty, depth, exit rule, gate and mode.

Writes `quality.json`, `quality.md` and `quality.png` into `benchmarks/results/`. Figures of the
shipped gate come from the served engine (vLLM's `LLM`), in `skip`, `exact` and `shared`; those of
other gates come from the PyTorch reference, and say so.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from ouro_runtime.training.evaluate import (
    Check,
    Result,
    Setting,
    check_shared,
    checks,
    fixed_at,
    prompts_of,
    score,
    suite,
)
from ouro_runtime.training.export import load
from ouro_runtime.training.reference import MODES, Controls, Reference
from ouro_runtime.training.tasks import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9)
RULES = {
    "margin": (0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    "delta": (0.6, 0.5, 0.45, 0.4, 0.35, 0.3),
}
"""Exit rules beside the gate, with the thresholds of each in its own unit, the cheapest first."""

MAX_TOKENS = 24
SHIPPED = "shipped"

Gates = dict[str, tuple[torch.Tensor, torch.Tensor]]

Replies = tuple[list[list[int]], list[list[int]]]
"""Token ids and their depths, per prompt, the stop token included."""


class Backend(Protocol):
    name: str

    def generate(self, prompts: Sequence[Sequence[int]], setting: Setting) -> Replies: ...


class ReferenceBackend:
    """The PyTorch oracle. The same prompts are prefilled once, whatever the settings."""

    name = "reference"

    def __init__(self, model: Path, gates: Gates) -> None:
        lm, _ = load(model)
        self.engines = {SHIPPED: Reference(lm)} | {n: Reference(lm, g) for n, g in gates.items()}
        self._key: int | None = None
        self._start: Any = None

    def generate(self, prompts: Sequence[Sequence[int]], setting: Setting) -> Replies:
        engine = self.engines[setting.gate]
        if self._key != id(prompts):
            self._key, self._start = id(prompts), engine.prefill(prompts, MAX_TOKENS)
        return engine.decode(self._start, setting.controls, MAX_TOKENS)


class EngineBackend:
    """The served engine, through vLLM's own `LLM`."""

    name = "engine"

    def __init__(self, model: Path, dtype: str = "float32") -> None:
        from vllm import LLM

        # A fixed cache: by default vLLM takes a share of the machine's memory, or refuses to start.
        self.llm = LLM(
            model=str(model),
            dtype=dtype,
            max_model_len=512,
            max_num_seqs=128,
            kv_cache_memory_bytes=512 << 20,
            enforce_eager=True,
        )

    def generate(self, prompts: Sequence[Sequence[int]], setting: Setting) -> Replies:
        from vllm import SamplingParams

        c = setting.controls
        params = SamplingParams(
            temperature=0,
            max_tokens=MAX_TOKENS,
            stop_token_ids=[0, 2],
            extra_args={
                "exit_threshold": c.exit_threshold,
                "min_loops": c.min_loops,
                "max_loops": c.max_loops,
                "exit_mode": c.exit_mode,
                "exit_rule": c.exit_rule,
            },
        )
        inputs = [{"prompt_token_ids": list(p)} for p in prompts]
        outs = [o.outputs[0] for o in self.llm.generate(inputs, params, use_tqdm=False)]
        return [list(o.token_ids) for o in outs], [list(o.depths) for o in outs]


def sweep(loops: int, gates: Sequence[str], thresholds: Sequence[float]) -> list[Setting]:
    """Fixed depths; the shipped gate in every mode; other rules and other gates in `skip`."""
    out = [Setting(SHIPPED, Controls(max_loops=d)) for d in range(1, loops + 1)]
    out.append(Setting(SHIPPED, Controls(max_loops=loops, exit_mode="shared")))
    for mode in MODES:
        out += [Setting(SHIPPED, Controls(q, 1, loops, mode)) for q in thresholds]
    for rule, of_rule in RULES.items():
        out += [Setting(SHIPPED, Controls(q, 1, loops, exit_rule=rule)) for q in of_rule]
    for gate in gates:
        out += [Setting(gate, Controls(q, 1, loops)) for q in thresholds]
    return out


def measure(
    settings: Sequence[Setting], backend: Backend, problems: int, tok: Tokenizer, loops: int
) -> list[Result]:
    """Every setting over the suite, on one backend."""
    results = [Result(s) for s in settings]
    cells = suite(problems)
    bar = tqdm(total=len(cells) * len(settings), desc=backend.name, mininterval=10.0)
    for cell, drawn in cells.items():
        prompts = prompts_of(drawn, tok)
        for result in results:
            tokens, depths = backend.generate(prompts, result.setting)
            result.cells[cell] = score(drawn, tokens, depths, tok, loops)
            bar.update()
    bar.close()
    return results


def measure_reference(
    settings: Sequence[Setting], model: Path, gates: Gates, problems: int
) -> list[Result]:
    """`measure` with the PyTorch reference, in whatever process this is called."""
    torch.set_num_threads(1)
    lm, tok = load(model)
    return measure(settings, ReferenceBackend(model, gates), problems, tok, lm.cfg.loops)


def measure_all(
    settings: Sequence[Setting],
    model: Path,
    gates: Gates,
    problems: int,
    engine: bool,
    found: dict[Setting, tuple[str, Result]],
) -> list[tuple[str, Result]]:
    """(backend, result) of every setting, in order: those `found` before, and of the others with
    `engine` what it can run, and the rest by the reference, beside it in a process of its own."""
    left = [s for s in settings if s not in found]
    served = [s for s in left if engine and s.gate == SHIPPED]
    rest = [s for s in left if s not in served]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        beside = pool.submit(measure_reference, rest, model, gates, problems)
        if served:
            lm, tok = load(model)
            ran = measure(served, EngineBackend(model), problems, tok, lm.cfg.loops)
            found |= {r.setting: (EngineBackend.name, r) for r in ran}
        found |= {r.setting: (ReferenceBackend.name, r) for r in beside.result()}
    return [found[s] for s in settings]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def report(results: list[Result], targets: list[Check], best: Result | None, facts: str) -> str:
    """The markdown page."""
    fixed = fixed_depths(results)
    rows = []
    for family, level in fixed[-1].cells:
        row = [family, f"{level + 1} {FAMILIES[family].unit}"]
        row += [f"{r.cells[family, level].accuracy:.1f}" for r in fixed]
        if best is not None:
            cell = best.cells[family, level]
            row += [f"{cell.accuracy:.1f}", f"{cell.depth:.2f}"]
        rows.append(row)
    head = ["family", "difficulty", *(f"depth {r.setting.controls.max_loops}" for r in fixed)]
    if best is not None:
        q = best.setting.controls.exit_threshold
        head += [f"skip q={q:g}", "its mean depth"]
    points = [
        [
            "none" if r.setting.controls.off else r.setting.by,
            r.setting.controls.exit_mode,
            f"{r.setting.controls.exit_threshold:g}",
            str(r.setting.controls.max_loops),
            f"{r.total().depth:.2f}",
            f"{r.total().accuracy:.2f}",
            f"{r.total().accuracy - fixed_at(fixed, r.total().depth):+.2f}",
        ]
        for r in results
    ]
    verdicts = [["yes" if c.holds else "NO", c.target, c.measured] for c in targets]
    return "\n\n".join(
        [
            "# Quality of ouro-mini",
            facts,
            "![frontiers](quality.png)",
            "## Targets",
            table(("holds", "target", "measured"), verdicts),
            "## Exact match in percent, by family, difficulty and depth",
            table(head, rows),
            "## Every setting, over the whole suite",
            table(
                ("by", "mode", "q", "max", "mean depth", "exact match %", "less fixed depth"),
                points,
            ),
        ]
    ) + "\n"  # fmt: skip


def fixed_depths(results: Sequence[Result]) -> list[Result]:
    return [
        r for r in results if r.setting.controls.off and r.setting.controls.exit_mode != "shared"
    ]


def gated(results: Sequence[Result], by: str, mode: str) -> list[Result]:
    """What a gate, or another exit rule, gave in a mode."""
    return [
        r
        for r in results
        if r.setting.by == by
        and r.setting.controls.exit_mode == mode
        and not r.setting.controls.off
    ]


def picture(results: list[Result], best: Result | None, path: Path) -> None:
    """Exit rules, gates, modes, and depth by difficulty."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fixed = fixed_depths(results)
    figure, grid = plt.subplots(2, 2, figsize=(11, 8.5))
    axes = grid.flatten()
    gates = [SHIPPED, *sorted({r.setting.gate for r in results} - {SHIPPED})]
    rules = [("gate", SHIPPED), *((rule, rule) for rule in RULES)]
    curves = [
        (axes[0], "exit rules (skip)", [(n, gated(results, by, "skip")) for n, by in rules]),
        (axes[1], "gates (skip)", [(g, gated(results, g, "skip")) for g in gates]),
        (axes[2], "modes (shipped gate)", [(m, gated(results, SHIPPED, m)) for m in MODES]),
    ]
    for axis, title, series in curves:
        axis.plot(
            [r.total().depth for r in fixed],
            [r.total().accuracy for r in fixed],
            "k--o",
            label="fixed depth",
        )
        for name, points in series:
            if points:
                xs, ys = [p.total().depth for p in points], [p.total().accuracy for p in points]
                style = "-o" if name == SHIPPED or not title.startswith("gates") else "--."
                axis.plot(xs, ys, style, label=name, alpha=0.8)
        axis.set(title=title, xlabel="mean depth of generated tokens", ylabel="exact match, %")
        axis.legend()
        axis.grid(alpha=0.3)
    if best is not None:
        for family in dict.fromkeys(f for f, _ in best.cells):
            levels = [n for f, n in best.cells if f == family]
            axes[2].plot(
                [n + 1 for n in levels],
                [best.cells[family, n].depth for n in levels],
                "-o",
                label=family,
            )
        q = best.setting.controls.exit_threshold
        axes[2].set(
            title=f"mean depth by difficulty, q = {q:g}",
            xlabel="digits, operations, links, swaps",
            ylabel="depth",
        )
        axes[2].legend()
        axes[2].grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def read_kept(path: Path, problems: int) -> dict[Setting, tuple[str, Result]]:
    """(backend, result) of the settings in a `quality.json`; those of so many problems a cell."""
    if not path.exists():
        return {}
    kept = [(r["backend"], Result.from_dict(r)) for r in json.loads(path.read_text())["results"]]
    return {
        result.setting: (backend, result)
        for backend, result in kept
        if all(score.problems == problems for score in result.cells.values())
    }


def read_gates(path: Path) -> Gates:
    if not path.exists():
        return {}
    data = np.load(path)
    names = sorted({k.rsplit(".", 1)[0] for k in data.files})
    return {
        n: (torch.from_numpy(data[f"{n}.weight"]), torch.from_numpy(data[f"{n}.bias"]))
        for n in names
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--backend", choices=("engine", "reference"), default="engine")
    p.add_argument("--model", type=Path, default=ROOT / "ouro_runtime/checkpoints/ouro-mini")
    p.add_argument("--gates", type=Path, default=ROOT / "benchmarks/results/quality.gates.npz")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    p.add_argument("--problems", type=int, default=500, help="per family and difficulty")
    p.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    p.add_argument(
        "--keep",
        action="store_true",
        help="take what quality.json in --out has of as many problems, measure only the rest",
    )
    p.add_argument("--at-most", type=int, help="measure so many settings, leave the rest out")
    args = p.parse_args()
    start = time.monotonic()
    lm, _ = load(args.model)
    loops = lm.cfg.loops
    gates = read_gates(args.gates)
    own = lm.model.early_exit_gate.weight[0].detach()
    origin = next((n for n, (w, _) in gates.items() if torch.equal(w, own)), "unknown")
    gates.pop(origin, None)
    settings = sweep(loops, sorted(gates), args.thresholds)
    engine = args.backend == "engine"
    found = read_kept(args.out / "quality.json", args.problems) if args.keep else {}
    before = [s for s in settings if s in found]
    if args.at_most is not None:
        missing = [s for s in settings if s not in found][args.at_most :]
        settings = [s for s in settings if s not in missing]
    ran = measure_all(settings, args.model, gates, args.problems, engine, found)
    results = [r for _, r in ran]
    targets, best = checks(fixed_depths(results), gated(results, SHIPPED, "skip"))
    targets += check_shared([r for r in results if r.setting.gate == SHIPPED])
    facts = (
        f"{args.problems} held-out problems per family and difficulty, greedy, float32. Fixed "
        f"depths, the modes of the shipped gate, and the other rules: {args.backend}; "
        f"the other gates: reference. The shipped gate is `{origin}`. "
        f"torch {torch.__version__}, {platform.machine()} CPU, "
        f"{(time.monotonic() - start) / 60:.0f} minutes"
        + (f" for the last {len(settings) - len(before)} settings." if before else ".")
    )
    args.out.mkdir(parents=True, exist_ok=True)
    page = {
        "facts": facts,
        "targets": [vars(c) for c in targets],
        "recommended": best.setting.label if best else None,
        "results": [{"backend": b} | r.to_dict() for b, r in ran],
    }
    (args.out / "quality.json").write_text(json.dumps(page, indent=1) + "\n")
    text = report(results, targets, best, facts)
    (args.out / "quality.md").write_text(text)
    picture(results, best, args.out / "quality.png")
    print(text)


if __name__ == "__main__":
    main()
