"""What `ouro-serve calibrate` reads: the questions' file, and its options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ouro_server.calibrate.errors import CalibrationError
from ouro_server.calibrate.plan import Plan, build_parser
from ouro_server.calibrate.questions import parse, read

TURN = {"role": "user", "content": "What is 2 + 3?"}


def test_prompts_and_chats_are_read_with_and_without_what_is_expected(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    lines = [
        {"prompt": "2 + 3 ="},
        {"messages": [TURN], "expected": "5"},
        {"prompt": "é", "expected": ["a", "b"]},
    ]
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n")
    first, second, third = read(file)
    assert (first.line, first.prompt, first.messages, first.expected) == (1, "2 + 3 =", (), ())
    assert (second.line, second.prompt, second.messages) == (3, None, (TURN,))
    assert second.right(" 5\n") and not second.right("15")
    assert third.right("b") and not third.right("")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "must be a JSON object"),
        ("{}", "prompt or messages"),
        ({"prompt": "a", "messages": [TURN]}, "prompt or messages"),
        ({"promt": "a"}, "unknown field 'promt'; known are prompt, messages, expected"),
        ({"prompt": ""}, "prompt must be text"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt": None}, "prompt must be text"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": [TURN, {"role": "user"}]}, "messages[1] must have role and content"),
        ({"messages": [TURN | {"content": ["x"]}]}, "messages[0] must have role and content"),
        ({"messages": [TURN | {"name": "x"}]}, "messages[0] must have role and content"),
        ({"prompt": "a", "expected": 5}, "expected must be text"),
        ({"prompt": "a", "expected": []}, "expected must be text"),
        ({"prompt": "a", "expected": None}, "expected must be text"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_field(
    line: object, said: str, tmp_path: Path
) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    file = tmp_path / "q.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n\n{text}\n')
    with pytest.raises(CalibrationError) as refusal:
        read(file)
    assert str(refusal.value).startswith(f"{file}, line 3: ")
    assert said in str(refusal.value)


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    with pytest.raises(CalibrationError, match="cannot be read"):
        read(file)
    file.write_text("\n")
    with pytest.raises(CalibrationError, match="no questions"):
        read(file)
    file.write_bytes(b"\xff\n")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        read(file)


def test_the_same_question_is_known_again() -> None:
    chat = json.dumps({"messages": [TURN]})
    assert parse(chat, 1).asked == parse(json.dumps({"messages": [TURN], "expected": "5"}), 2).asked
    assert parse(chat, 1).asked != parse('{"prompt": "What is 2 + 3?"}', 1).asked


def plan(*options: str) -> Plan:
    return Plan.of(build_parser().parse_args(["m", "q.jsonl", *options]))


def test_the_defaults_are_one_promise() -> None:
    made = plan()
    assert (made.losses, made.confidence, made.modes, made.check) == (
        (0.01,),
        0.95,
        ("skip",),
        "agree",
    )
    assert made.each == pytest.approx(0.95)
    (grid,) = made.thresholds.values()
    assert grid == tuple(sorted(grid, reverse=True))
    assert 1.0 not in grid


def test_promises_share_the_confidence() -> None:
    made = plan("--loss", "0.05,0.01", "--modes", "skip,exact", "--confidence", "0.9")
    assert made.losses == (0.01, 0.05)
    assert made.each == pytest.approx(0.975)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--loss", "0", "above 0 and below 1"),
        ("--loss", "1", "above 0 and below 1"),
        ("--loss", "nan", "above 0 and below 1"),
        ("--loss", "0.01,", "above 0 and below 1"),
        ("--loss", "few", "above 0 and below 1"),
        ("--confidence", "0.5", "above 0.5 and below 1"),
        ("--confidence", "1", "above 0.5 and below 1"),
        ("--thresholds", "1.5", "from 0 to 1"),
        ("--thresholds", "1", "another one than 1"),
        ("--rules", "gate,", "one of gate, margin, delta"),
        ("--modes", "shared", "one of skip, exact, got 'shared'"),
        ("--modes", "skip,", "one of skip, exact"),
        ("--modes", "lossless", "nothing to calibrate"),
        ("--modes", "auto", "nothing to calibrate"),
        ("--check", "both", "one of agree, expected"),
        ("--max-tokens", "0", "an integer of 1 or more"),
        ("--max-tokens", "1.5", "an integer of 1 or more"),
        ("--chunk", "-1", "an integer of 1 or more"),
    ],
)
def test_a_bad_option_is_named_with_what_is_allowed(option: str, value: str, said: str) -> None:
    with pytest.raises(CalibrationError) as refusal:
        plan(f"{option}={value}")
    assert option in str(refusal.value)
    assert said in str(refusal.value)


def test_thresholds_are_of_one_rule_and_in_its_unit() -> None:
    assert plan("--rules=delta", "--thresholds=2,0.5,0").thresholds == {"delta": (0.5, 2.0)}
    with pytest.raises(CalibrationError, match="from 0 to 2 for the rule delta"):
        plan("--rules=delta", "--thresholds=2.5")
    with pytest.raises(CalibrationError, match="--thresholds are of one rule"):
        plan("--rules=gate,margin", "--thresholds=0.5")
