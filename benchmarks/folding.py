"""Pages that `skip` saves where no position of a block went deep, on the shipped checkpoint.

    python -m benchmarks.folding [--problems 10] [--tokens 512]

ouro-mini generates past the end of its answers to held-out problems, with the depths that its gate
gives at each threshold. From those depths follows what is held at each block size, also at sizes
that the CPU engine does not take: a full block of generated positions has as many pages as its
deepest position has loops, every other block has T (`ouro_runtime/cache/folding.py`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.engines import MINI, ROOT, Engine, machine, worker_cores
from benchmarks.report import print_table
from benchmarks.workload import LOOPS

RESULTS = ROOT / "benchmarks" / "results" / "folding.json"
THRESHOLDS = (0.3, 0.5)
BLOCKS = (16, 32, 128)
LONG = 512
"""Tokens of the long texts that answers are strung together to."""

Text = tuple[int, list[int]]
"""Tokens of a prompt, and the depth of each generated token."""


def held(texts: Sequence[Text], block_size: int) -> dict[str, float]:
    """What requests hold when their last token is out, with blocks folded.

    Returns:
        `pages`: of a full block of generated positions, on average (T without folding; 0 if no
        text fills one). `saved`: share of all pages of the requests, prompts and last blocks too.
    """
    from ouro_runtime.cache.folding import BlockDepths

    blocks = saved = total = 0
    for prompt, depths in texts:
        of_blocks = BlockDepths(prompt, block_size, LOOPS)
        of_blocks.step(depths)
        positions = prompt + len(depths) - 1
        saved += sum(LOOPS - depth for _, depth in of_blocks.due(positions))
        total += LOOPS * -(-positions // block_size)
        blocks += max(0, positions // block_size - -(-prompt // block_size))
    return {"pages": LOOPS - saved / blocks if blocks else 0.0, "saved": saved / total}


def texts_of(prompts: list[list[int]], answers: dict[str, Any]) -> dict[str, list[Text]]:
    """The texts that are measured, by what they are."""
    from ouro_runtime.training.reference import STOP_IDS

    whole = [(len(p), depths) for p, depths in zip(prompts, answers["depths"], strict=True)]
    ends = [
        1 + next((at for at, token in enumerate(tokens) if token in STOP_IDS), len(tokens) - 1)
        for tokens in answers["tokens"]
    ]
    alone = [(prompt, depths[:end]) for (prompt, depths), end in zip(whole, ends, strict=True)]
    strung = list(chain.from_iterable(depths for _, depths in alone))
    return {
        "answers as they are": alone,
        "answers strung together": [
            (1, strung[at : at + LONG]) for at in range(0, max(1, len(strung) - LONG + 1), LONG)
        ],
        "run on past the answer": whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", type=int, default=10, help="of each family and difficulty")
    parser.add_argument("--tokens", type=int, default=LONG, help="of each that runs on")
    parser.add_argument("--threads", type=int, help="of the engine (default: all cores but one)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    from tokenizers import Tokenizer

    from ouro_runtime.training.evaluate import prompts_of, suite

    tok = Tokenizer.from_file(str(MINI / "tokenizer.json"))
    problems = list(chain.from_iterable(suite(options.problems).values()))
    prompts = prompts_of(problems, tok)
    rows: list[dict[str, Any]] = []
    settings = ("--dtype", "float32", "--eager", "--max-num-seqs", "64")
    with Engine("ours", MINI, worker_cores(options.threads), *settings) as ours:
        result: dict[str, Any] = {"machine": machine(ours), "prompts": len(prompts)}
        for threshold in THRESHOLDS:
            extra = {"exit_mode": "skip", "exit_threshold": threshold}
            answers = ours.ask(
                "generate", prompts=prompts, tokens=options.tokens, extra=[extra] * len(prompts)
            )
            for name, texts in texts_of(prompts, answers).items():
                depths = list(chain.from_iterable(depths for _, depths in texts))
                rows.append(
                    {
                        "threshold": threshold,
                        "text": name,
                        "tokens": len(depths) / len(texts),
                        "depth": sum(depths) / len(depths),
                        "blocks": {size: held(texts, size) for size in BLOCKS},
                    }
                )
    print("\npages of a full block of generated positions, of 4, and pages saved of all, by block")
    print_table(
        ("threshold", "text", "tokens", "mean depth", *(f"{size} positions" for size in BLOCKS)),
        [
            (
                f"{row['threshold']:g}",
                row["text"],
                f"{row['tokens']:.0f}",
                f"{row['depth']:.2f}",
                *(f"{b['pages']:.2f}, {100 * b['saved']:.1f} %" for b in row["blocks"].values()),
            )
            for row in rows
        ],
    )
    result["rows"] = rows
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
