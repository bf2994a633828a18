"""What is captured, and how, for any number of loops."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ouro_runtime.engine.cuda import graphs
from ouro_runtime.engine.cuda.backend import LaneShape
from ouro_runtime.engine.cuda.engine import LaneEngine
from ouro_runtime.engine.cuda.graphs import StepGraphs
from ouro_runtime.engine.cuda.lanes import LaneBuffers

LANES, H = 4, 8
TABLE = torch.zeros(16, H)


def engine(loops: int, alone: bool) -> LaneEngine:
    drafts = loops > 1
    buffers = LaneBuffers(LANES, LANES, LANES, loops, H, torch.float32, "cpu", drafts)
    shape = LaneShape(loops, 16, torch.zeros(H), torch.zeros(1))
    vocabulary: Any = SimpleNamespace(alone=alone, embedding=lambda tokens, _: (TABLE, tokens))
    blocks = torch.zeros(loops, LANES, 2, dtype=torch.int32)
    nothing: Any = None
    return LaneEngine(
        buffers, shape, None, nothing, blocks, nothing, vocabulary, lambda *_: False, nothing
    )


@pytest.mark.parametrize("loops", [1, 2, 3, 6])
def test_every_number_of_loops_can_be_captured(loops: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "graph_capture", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    captured = StepGraphs(torch.device("cpu"))
    monkeypatch.setattr(captured, "_record", partial)
    made = engine(loops, alone=True)
    pieces, drafting = made.capturable(), made.capturable(drafts=True)
    assert list(pieces) == ["begin", "block", "read", *["advance"] * (loops > 1), "carry"]
    # Those need a model; the others are run as the capture runs them.
    stubs = dict.fromkeys(("block", "read"), lambda lanes: None)
    assert list(drafting) == [f"draft_{name}" for name in pieces if loops > 1]
    draft_stubs = {f"draft_{name}": stub for name, stub in stubs.items() if drafting}
    captured.capture((1, LANES), pieces | stubs, (LANES,), drafting | draft_stubs)
    assert captured.buckets == (1, LANES) and captured.draft_buckets == (LANES,)
    expected = {(name, lanes) for name in pieces for lanes in (1, LANES)}
    assert captured._graphs.keys() == expected | {(name, LANES) for name in drafting}
    assert [captured.width(2, drafts) for drafts in (False, True)] == [LANES, LANES]
    assert [captured.width(1, drafts) for drafts in (False, True)] == [1, LANES]


def test_pieces_that_talk_to_other_processes_are_not_captured() -> None:
    alone = engine(4, alone=False)
    assert list(alone.capturable()) == ["begin", "block", "carry"]
    names = ["draft_begin", "draft_block", "draft_carry"]
    assert list(alone.capturable(drafts=True)) == names
