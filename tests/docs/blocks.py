"""The fenced blocks of the documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ("docs/api.md", "docs/cluster.md", "docs/depth.md", "docs/operations.md")
SERVER = "http://127.0.0.1:8000"
"""Where commands of the documentation expect a server."""

SHELL = ("", "sh", "bash")
"""Languages of blocks that are commands; a block without one is taken for one."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"\w+=")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language and its text."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell block; `answer` is the JSON block that follows it, if one does."""

    block: Block
    text: str
    answer: Block | None

    @property
    def words(self) -> list[str]:
        """Split as a shell would, without assignments in front."""
        words = shlex.split(self.text)
        while words and ASSIGNMENT.match(words[0]):
            words.pop(0)
        return words

    @property
    def asks_a_server(self) -> bool:
        return SERVER in self.text

    def __str__(self) -> str:
        return f"{self.block} {self.text[:40]}"


def blocks(document: str) -> list[Block]:
    """The fenced blocks of a document, in order."""
    text = (ROOT / document).read_text()
    return [
        Block(document, text.count("\n", 0, found.start()) + 2, found[1], found[2])
        for found in FENCE.finditer(text)
    ]


def commands(document: str) -> Iterator[Command]:
    """Every command of a document's shell blocks, in order."""
    found = blocks(document)
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language in SHELL:
            *first, last = split(block.text)
            follows = after is not None and after.line == block.line + block.text.count("\n") + 2
            answer = after if follows and after and after.language == "json" else None
            yield from (Command(block, text, None) for text in first)
            yield Command(block, last, answer)


def split(text: str) -> list[str]:
    """A shell block's commands: a line each, but for open quotes and a backslash at the end."""
    found = [""]
    for line in text.splitlines():
        found[-1] += line
        if line.endswith("\\") or not closed(found[-1]):
            found[-1] += "\n"
        else:
            found.append("")
    return [one for one in found if one.strip() and not one.startswith("#")]


def closed(text: str) -> bool:
    try:
        shlex.split(text)
    except ValueError:
        return False
    return True


ALL = [command for document in DOCS for command in commands(document)]
