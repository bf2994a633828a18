"""Which answers each threshold loses, over a large pool of ouro-mini's held-out problems.

`calibration_pool.json` is made by the command under test itself, in minutes; a run that was killed
goes on when it is called again:

    python -m tests.server.calibration_pool --work FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
EACH = 100
"""Problems of every family and difficulty."""

THRESHOLDS = (0.9, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25)


def load() -> tuple[tuple[float, ...], np.ndarray]:
    """Thresholds from 1 down, and whether each lost each answer: bool [thresholds, problems]."""
    data = json.loads(FILE.read_text())
    rows = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in data["lost"].values()]
    lost = np.unpackbits(np.stack(rows), axis=1, count=data["problems"]).astype(bool)
    return (1.0, *map(float, data["lost"])), np.vstack([np.zeros_like(lost[:1]), lost])


def pack(state: Path) -> dict[str, object]:
    """What `load` reads, of a calibration's state."""
    lost: dict[str, list[int]] = {}
    for line in state.read_text().splitlines()[1:]:
        name, found = json.loads(line)
        mode, _, place = name.partition(" ")
        if mode == "skip":
            lost.setdefault(place.split()[0], []).extend(found["lost"])
    (problems,) = {len(row) for row in lost.values()}
    return {
        "about": "Answers that ouro-mini loses at each threshold, a bit a problem, in hexadecimal: "
        "python -m tests.server.calibration_pool",
        "problems": problems,
        "lost": {q: np.packbits(np.array(row, bool)).tobytes().hex() for q, row in lost.items()},
    }


def main() -> None:
    from ouro_server import cli
    from tests.server.calibrating import write_questions

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    write_questions(work / "questions.jsonl", EACH)
    command = ["calibrate", "ouro-mini", str(work / "questions.jsonl"), "--out", str(work)]
    command += ["--thresholds", ",".join(map(str, THRESHOLDS)), "--max-tokens", "24"]
    command += ["--chunk", "256", "--enforce-eager"]
    cli.main(command)
    FILE.write_text(json.dumps(pack(work / "state.jsonl"), indent=1) + "\n")


if __name__ == "__main__":
    main()
