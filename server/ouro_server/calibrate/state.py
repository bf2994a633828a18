"""What a calibration has found so far, in a file that outlives it.

The first line says what the rest belongs to; each further one is what a chunk of questions gave,
written and synced when it was done. A line that a kill cut short is dropped.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ouro_server.calibrate.errors import CalibrationError

FORMAT = 1


class State:
    """The chunks of one run, by name. Use `opened`."""

    def __init__(self, file: IO[str], chunks: dict[str, Any]) -> None:
        self._file = file
        self._chunks = chunks

    def __contains__(self, name: str) -> bool:
        return name in self._chunks

    def __getitem__(self, name: str) -> Any:
        return self._chunks[name]

    def add(self, name: str, found: Any) -> None:
        """Keep what a chunk gave: on the disk when this returns."""
        self._chunks[name] = found
        _write(self._file, [name, found])


@contextmanager
def opened(path: Path, belongs: Mapping[str, Any]) -> Iterator[State]:
    """The state in the file `path`, made if there is none.

    Args:
        belongs: what the chunks are of: JSON values by name.

    Raises:
        CalibrationError: if the file belongs to something else, is none of ours, or is in use.
    """
    head = json.loads(json.dumps({"format": FORMAT, **belongs}))
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CalibrationError(f"{path}: another calibration is writing to it") from None
        file.seek(0)
        text = file.read()
        whole = text[: text.rfind("\n") + 1]
        file.truncate(len(whole.encode()))
        lines = whole.splitlines()
        if lines:
            _compare(path, _line(path, 1, lines[0], dict), head)
        else:
            _write(file, head)
        chunks = dict(_line(path, n, line, list) for n, line in enumerate(lines[1:], 2))
        yield State(file, chunks)


def _write(file: IO[str], value: Any) -> None:
    file.write(json.dumps(value) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _line(path: Path, number: int, text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise CalibrationError(f"{path}, line {number}: not a calibration's; delete the file")
    return value


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            was = f" ({found.get(name)!r:.80}, now {value!r:.80})"
            raise CalibrationError(
                f"{path} is of another run: its {name} differs{was}. Promises and answers of two "
                "runs do not mix: choose another --out, or delete the file"
            )
