"""`ouro-serve calibrate`, from its command line to what it writes."""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import ouro_runtime
from ouro_server import checkpoint, settings
from ouro_server.bounds import trials_needed
from ouro_server.calibrate import plot, presets, report
from ouro_server.calibrate.choose import Point, choose
from ouro_server.calibrate.errors import CalibrationError
from ouro_server.calibrate.plan import NO_PROMISE, Plan, build_parser
from ouro_server.calibrate.questions import Question, read
from ouro_server.calibrate.run import Engine, Run, check_expected
from ouro_server.calibrate.state import opened
from ouro_server.presets import PresetBook

READ = ("*.json", "*.jinja", "*.safetensors")
"""Files that make a checkpoint what it is."""


def main(argv: Sequence[str]) -> int:
    """Calibrate. Status 0, or `NO_PROMISE`.

    Raises:
        CalibrationError, RefusedError, PresetError: naming what is wrong.
    """
    options, rest = build_parser().parse_known_args(list(argv))
    plan, questions = Plan.of(options), read(options.questions)
    check_expected(plan, questions)
    model = checkpoint.locate(options.model)
    config = checkpoint.read_config(model)
    loops = checkpoint.ANY_LOOPS if config is None else config["total_ut_steps"]
    PresetBook.load(options.presets, loops)
    if config is not None:
        checkpoint.check_files(model)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.update(settings.environment(os.environ, rest, config is not None))
    few = trials_needed(max(plan.losses), plan.each)
    if len(questions) < few:
        _say(f"{len(questions)} questions can promise nothing; {few} are needed")
    belongs = {
        "model": fingerprint(model, config is not None),
        "questions": digest(repr(questions).encode()),
        "version": ouro_runtime.__version__,
        "engine options": rest,
        **vars(plan),
    }
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    with opened(out / "state.jsonl", belongs) as state:
        grids = sum(map(len, plan.thresholds.values()))
        total = len(questions) * (1 + len(plan.modes) * grids)
        with tqdm(total=total, unit="answer", file=sys.stderr) as bar:

            def tell(what: str, count: int) -> None:
                bar.set_description(what, refresh=False)
                bar.update(count)

            run = Run(plan, questions, state, lambda: start(model, rest, config), tell)
            points = run.points()
    return finish(options, plan, questions, points)


def start(model: str, rest: Sequence[str], config: dict[str, Any] | None) -> Engine:
    """The engine that a server with these options would have, in this process."""
    from ouro_server import launch
    from ouro_server.calibrate.engine import VllmEngine
    from ouro_server.vllm_api import offline_engine

    args = launch.parse_engine(model, rest)
    launch.complete(args, {}, config)
    return VllmEngine(offline_engine(args))


def finish(
    options: Any, plan: Plan, questions: Sequence[Question], points: dict[str, list[Point]]
) -> int:
    """Choose, write the files, and say what came of it."""
    promises = [
        presets.Promise(plan, series, choose(points[series.name], loss, plan.each))
        for series in plan.series
        for loss in plan.losses
    ]
    loops = round(next(iter(points.values()))[0].mean_depth)
    facts = report.Facts(
        options.model,
        options.questions.name,
        len(questions),
        len({question.asked for question in questions}),
        loops,
    )
    out: Path = options.out
    (out / "report.md").write_text(report.page(facts, plan, points, promises), encoding="utf-8")
    (out / "report.svg").write_text(plot.draw(points, promises, loops), encoding="utf-8")
    for promise in promises:
        _say(report.verdict(promise, len(questions)))
    file = out / "presets.yaml"
    if not any(promise.choice.chosen for promise in promises):
        # One that an earlier run left would be taken for this one's.
        file.unlink(missing_ok=True)
        _say(f"wrote {out / 'report.md'}, and no presets: nothing can be promised")
        return NO_PROMISE
    content = presets.content(options.presets, promises, len(questions), loops)
    PresetBook.parse(content, loops)
    presets.write(file, content, f"{facts.model}, {facts.questions} questions")
    served = "" if checkpoint.is_shipped(options.model) else f"{options.model} "
    _say(f"wrote {out / 'report.md'} and {file}: ouro-serve {served}--presets {file}")
    return 0


def fingerprint(model: str, local: bool) -> str:
    """What changes when a checkpoint does: a digest of its files; of one elsewhere, its name."""
    if not local:
        return model
    files = sorted(file for pattern in READ for file in Path(model).glob(pattern))
    parts = []
    for file in files:
        with file.open("rb") as stream:
            parts.append(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}")
    return digest("\n".join(parts).encode())


def digest(data: bytes) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _say(text: str) -> None:
    print(text, flush=True)


__all__ = ["CalibrationError", "main"]
