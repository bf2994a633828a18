"""Notes of tokens: from the passes of a step to each request, and back to lists."""

import numpy as np

from ouro_runtime.engine.step_output import StepOutput, note_tokens, unpack_cdf
from ouro_runtime.loop.rows import Readout

LOOPS = 3


def readout(req: list[int], depth: list[int], tail: list[bool], exact: list[bool]) -> Readout:
    """CDF(n) of a token is n / 4, and 1 at the last loop."""
    cdf = np.array(
        [
            [(n + 1) / 4 if n + 1 < LOOPS else 1.0 for n in range(d)] + [0] * (LOOPS - d)
            for d in depth
        ],
        np.float32,
    )
    return Readout(
        rows=np.arange(len(req)),
        req=np.array(req),
        depth=np.array(depth),
        tail=np.array(tail),
        exact=np.array(exact),
        deferred=np.zeros(len(req), bool),
        cdf=cdf,
        final=np.ones(len(req), bool),
        loops_run=np.where(np.array(tail) | np.array(exact), LOOPS, depth),
        draft=np.full(len(req), -1),
        drafted=np.zeros(len(req), np.int64),
        dropped=np.zeros(len(req), np.int64),
    )


def test_every_request_gets_its_tokens_in_order() -> None:
    readouts = [
        readout([2, 0], [1, 2], tail=[False, True], exact=[False, False]),
        readout([0, 2], [3, 1], tail=[False, False], exact=[False, True]),
    ]
    notes = note_tokens(readouts, requests=4, loops=LOOPS)
    assert [n[:, 0].tolist() for n in notes] == [[2, 3], [], [1, 1], []]
    assert [n[:, 1].tolist() for n in notes] == [[3, 3], [], [1, 3], []], "loops run"
    assert [unpack_cdf(n) for n in notes] == [
        [[0.25, 0.5], [0.25, 0.5, 1.0]],
        [],
        [[0.25], [0.25]],
        [],
    ]
    output = StepOutput(dict(zip("abcd", notes, strict=True)), report=None)  # type: ignore[arg-type]
    assert output.depths("a") == [2, 3] and output.depths("b") == []


def test_a_step_without_tokens() -> None:
    assert [n.shape for n in note_tokens([], requests=2, loops=LOOPS)] == [(0, 4 + LOOPS)] * 2
