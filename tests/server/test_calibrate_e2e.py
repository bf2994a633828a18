"""`ouro-serve calibrate` on ouro-mini: killed, gone on with, compared with an engine at hand."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ouro_server import checkpoint
from ouro_server.calibrate import command
from ouro_server.calibrate.engine import VllmEngine
from ouro_server.calibrate.errors import CalibrationError
from ouro_server.calibrate.plan import Plan, build_parser
from ouro_server.calibrate.questions import parse, read
from ouro_server.calibrate.run import Run
from ouro_server.calibrate.state import opened
from ouro_server.presets import PresetBook
from tests.server.calibrating import LOOPS, write_questions
from tests.server.live import ROOT, environment

pytestmark = pytest.mark.slow

QUESTIONS = 40
CHUNKS = 5 * 5
OPTIONS = ["--loss", "0.1,0.01", "--thresholds", "0.9,0.5,0.3,0.05", "--chunk", "8"]
OPTIONS += ["--max-tokens", "24"]
ENGINE = ["--enforce-eager", "--kv-cache-memory-bytes", "128M"]
SECONDS = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where q.jsonl is."""
    made = tmp_path_factory.mktemp("calibration")
    write_questions(made / "q.jsonl", each=3, limit=QUESTIONS)
    return made


@pytest.fixture(scope="module")
def command_line(folder: Path) -> list[str]:
    where = ["ouro-mini", str(folder / "q.jsonl"), "--out", str(folder / "out")]
    return [sys.executable, "-m", "ouro_server", "calibrate", *where, *OPTIONS, *ENGINE]


@pytest.fixture(scope="module")
def cut(folder: Path, command_line: list[str]) -> list[str]:
    """The state's lines when a run was killed, once it had written some."""
    state = folder / "out" / "state.jsonl"
    with (folder / "killed.log").open("w") as log:
        running = subprocess.Popen(
            command_line, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=log
        )
    deadline = time.monotonic() + SECONDS
    while not state.exists() or state.read_text().count("\n") < 3:
        assert running.poll() is None, (folder / "killed.log").read_text()
        assert time.monotonic() < deadline, (folder / "killed.log").read_text()
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    lines = state.read_text().splitlines(keepends=True)
    assert len(lines) < 1 + CHUNKS
    return [line for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def resumed(folder: Path, command_line: list[str], cut: list[str]) -> Path:
    """What a second run, which went on, wrote."""
    done = subprocess.run(
        command_line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert "agree-99: no promise. 40 questions are too few" in done.stdout
    assert f"{QUESTIONS * 5}/{QUESTIONS * 5}" in done.stderr
    return folder / "out"


def test_a_killed_run_is_gone_on_with(resumed: Path, cut: list[str]) -> None:
    lines = (resumed / "state.jsonl").read_text().splitlines(keepends=True)
    assert lines[: len(cut)] == cut
    assert len(lines) == 1 + CHUNKS


def test_the_presets_are_those_that_a_server_takes(resumed: Path) -> None:
    book = PresetBook.load(resumed / "presets.yaml", LOOPS)
    assert "agree-90" in book.presets and "agree-99" not in book.presets
    assert book.presets["agree-90"].controls["exit_threshold"] < 1
    assert "agree-99: no promise" in (resumed / "report.md").read_text()


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    model = str(checkpoint.shipped())
    made = command.start(model, ENGINE, checkpoint.read_config(model))
    assert isinstance(made, VllmEngine)
    yield made
    made.llm.llm_engine.engine_core.shutdown()


def test_an_engine_at_hand_finds_the_same(
    resumed: Path, folder: Path, engine: VllmEngine, tmp_path: Path
) -> None:
    """Another chunk size, no kill, no processes: the same points."""
    plan = Plan.of(build_parser().parse_args(["m", "q", *OPTIONS]))
    questions = read(folder / "q.jsonl")
    with opened(tmp_path / "state.jsonl", {}) as state:
        whole = replace(plan, chunk=QUESTIONS)
        found = Run(whole, questions, state, lambda: engine, lambda *_: None).points()
    head = (resumed / "state.jsonl").read_text().splitlines()[0]
    with opened(resumed / "state.jsonl", json.loads(head)) as state:
        kept = Run(plan, questions, state, never, lambda *_: None).points()
    assert found == kept
    assert found["skip"][0].right == QUESTIONS
    assert found["skip"][-1].lost > 0


def never() -> VllmEngine:
    raise AssertionError("everything was answered")


@pytest.mark.parametrize(("mode", "threshold"), [("skip", 0.05), ("exact", 0.05), ("skip", 0.5)])
def test_a_pass_over_the_answer_tells_whether_it_is_that_of_full_depth(
    mode: str, threshold: float, folder: Path, engine: VllmEngine
) -> None:
    """And the first token that it does not confirm is the first that differs."""
    prompts = engine.prompts(read(folder / "q.jsonl"))
    full = [answer.tokens for answer in engine.answer(prompts, "skip", 1.0, 24)]
    assert all(all(choices) for choices in engine.choices(prompts, full))
    answers = [answer.tokens for answer in engine.answer(prompts, mode, threshold, 24)]
    for answer, of, choices in zip(answers, full, engine.choices(prompts, answers), strict=True):
        assert all(choices) == (answer == of)
        same = [a == b for a, b in zip(answer, of, strict=False)]
        if False in same:
            assert choices.index(False) == same.index(False)
    if threshold < 0.1:
        assert answers != full


def test_prompts_are_those_of_the_server(engine: VllmEngine) -> None:
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi?"}]
    questions = [parse(json.dumps({"messages": chat}), 1), parse('{"prompt": "2 + 3 ="}', 2)]
    ours = engine.prompts(questions)
    few = engine.llm.get_default_sampling_params()
    few.max_tokens = 1
    assert ours[0] == engine.llm.chat(chat, few, use_tqdm=False)[0].prompt_token_ids
    assert ours[1] == engine.llm.generate("2 + 3 =", few, use_tqdm=False)[0].prompt_token_ids


def test_the_longest_prompt_is_answered_and_a_longer_one_named_by_its_line(
    engine: VllmEngine,
) -> None:
    longest = engine.llm.model_config.max_model_len
    prompt = [[5] * (longest - 2)]
    (answer,) = engine.answer(prompt, "skip", 1.0, 24)
    assert len(answer.tokens) == 1
    assert engine.choices(prompt, [answer.tokens]) == [[True]]
    question = parse(json.dumps({"prompt": "3" * (longest - 1)}), 7)
    with pytest.raises(CalibrationError, match=f"line 7: {longest - 1} tokens leave no room"):
        engine.prompts([question])
