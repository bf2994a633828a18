"""The questions: one JSON object a line, a prompt or a chat, with or without what is expected."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouro_server.calibrate.errors import CalibrationError

FIELDS = ("prompt", "messages", "expected")
SHOWN = 60
"""Characters of a wrong value that a message repeats."""

Message = Mapping[str, str]


@dataclass(frozen=True)
class Question:
    """One line.

    Attributes:
        line: its number, from 1.
        prompt: text, as `/v1/completions` takes it; None for a chat.
        messages: the turns of a chat; empty for a prompt.
        expected: answers that are right; empty if none are known.
    """

    line: int
    prompt: str | None
    messages: tuple[Message, ...]
    expected: tuple[str, ...]

    @property
    def asked(self) -> str:
        """Equal for two lines that ask the same."""
        return json.dumps([self.prompt, self.messages], sort_keys=True)

    def right(self, answer: str) -> bool:
        """Whether `answer` is one of the expected, but for white space around it."""
        return answer.strip() in {text.strip() for text in self.expected}


def read(path: Path) -> list[Question]:
    """The questions in a file; empty lines are none.

    Raises:
        CalibrationError: naming the file, the line and the field.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 (byte {error.start})") from None
    questions = []
    for number, text in enumerate(lines, 1):
        if text.strip():
            try:
                questions.append(parse(text, number))
            except CalibrationError as error:
                raise CalibrationError(f"{path}, line {number}: {error}") from None
    if not questions:
        raise CalibrationError(f"{path}: no questions in it")
    return questions


def parse(text: str, line: int) -> Question:
    """One line of the file.

    Raises:
        CalibrationError: naming the field.
    """
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise CalibrationError(
            f"must be a JSON object with prompt or messages, got {_shown(entry)}"
        )
    for name in entry:
        if name not in FIELDS:
            raise CalibrationError(f"unknown field {name!r:.60}; known are {', '.join(FIELDS)}")
    if ("prompt" in entry) == ("messages" in entry):
        raise CalibrationError("prompt or messages must be there, one of them")
    prompt = entry.get("prompt")
    messages = _messages(entry["messages"]) if "messages" in entry else ()
    if not messages and not (isinstance(prompt, str) and prompt):
        raise CalibrationError(f"prompt must be text, not empty, got {_shown(prompt)}")
    return Question(line, prompt, messages, _expected(entry))


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise CalibrationError(f"messages must be a list of turns, got {_shown(value)}")
    for place, turn in enumerate(value):
        texts = isinstance(turn, dict) and turn.keys() == {"role", "content"}
        if not texts or not all(isinstance(text, str) for text in turn.values()):
            raise CalibrationError(
                f"messages[{place}] must have role and content, both text, and nothing else, "
                f"got {_shown(turn)}"
            )
    return tuple(value)


def _expected(entry: Mapping[str, Any]) -> tuple[str, ...]:
    if "expected" not in entry:
        return ()
    value = entry["expected"]
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise CalibrationError(f"expected must be text, or a list of texts, got {_shown(value)}")
    return tuple(texts)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
