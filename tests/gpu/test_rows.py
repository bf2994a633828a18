"""What a mixed pass tells vLLM's attention, and the model's `forward`."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context, override_forward_context

from ouro_runtime.engine.cuda.backend import RowView
from ouro_runtime.engine.cuda.lanes import LaneBuffers
from ouro_runtime.engine.cuda.model import OuroLaneModel
from ouro_runtime.engine.cuda.rows import RowPasses, parts

T = 4


class Group:
    """An attention group whose metadata is what its builder was given."""

    def __init__(self, backend: str) -> None:
        self.backend = SimpleNamespace(get_name=lambda: backend)

    layer_names = ("layer.0", "layer.1")
    kv_cache_spec = None

    def get_metadata_builder(self, ubatch: int) -> Any:
        return SimpleNamespace(supports_update_block_table=True)

    def build_metadata(self, common: Any, ubatch: int) -> Any:
        return common


def batch() -> Any:
    """A decoding request, and one with a chunk of three positions."""
    first = np.array([0, 1, 4], np.int32)
    return SimpleNamespace(
        num_reqs=2,
        num_tokens=4,
        query_start_loc=torch.from_numpy(first),
        query_start_loc_np=first,
        num_scheduled_tokens=np.array([1, 3], np.int32),
        seq_lens_cpu_upper_bound=torch.tensor([9, 3], dtype=torch.int32),
        is_prefilling_np=np.array([False, True]),
        idx_mapping_np=np.array([5, 2]),
    )


def row_passes(backend: str) -> RowPasses:
    tables = torch.arange(T * 3 * 2, dtype=torch.int32).view(T, 3, 2)

    def block(hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hidden + positions[:, None], None

    # The layers of the first loop are those that run.
    others = SimpleNamespace(layer_names=["layer.0.loop1"])
    first = SimpleNamespace(layer_names=list(Group.layer_names))
    groups = SimpleNamespace(kv_cache_groups=[first, others])
    return RowPasses(block, T, tables, [[Group(backend)], [Group(backend)]], groups, longest=11)


def test_every_request_reads_the_pages_of_its_loop() -> None:
    passes = row_passes("FLASH_ATTN")
    buffers = LaneBuffers(6, 2, 8, T, 3, torch.float32, "cpu")
    buffers.hidden.fill_(1)
    view = RowView(
        rows=4,
        padded=6,
        positions=torch.tensor([8, 0, 1, 2, 0, 0]),
        slots=torch.tensor([3, 40, 41, 42, -1, -1]),
        loop=torch.tensor([2, 1], dtype=torch.int32),
        seq_lens=torch.tensor([9, 3], dtype=torch.int32),
    )
    with override_forward_context(SimpleNamespace()):
        passes.run(batch(), buffers, view)
        context = get_forward_context()
    assert context.attn_metadata.keys() == context.slot_mapping.keys() == set(Group.layer_names)
    metadata = context.attn_metadata["layer.1"]
    assert metadata.block_table_tensor.tolist() == [[12, 13], [8, 9]]
    assert metadata.seq_lens.tolist() == [9, 3]
    assert metadata.query_start_loc.tolist() == [0, 1, 4]
    assert (metadata.num_reqs, metadata.num_actual_tokens, metadata.max_query_len) == (2, 4, 3)
    # A lane may move T - 1 positions in the step, but never past the longest sequence.
    assert metadata.max_seq_len == 11
    assert metadata.seq_lens_cpu_upper_bound.tolist() == [11, 6]
    assert metadata.slot_mapping.tolist() == view.slots.tolist()
    assert context.slot_mapping["layer.0"].tolist() == view.slots.tolist()
    assert buffers.hidden[:6, 0].tolist() == [9, 1, 2, 3, 1, 1]


def test_a_pass_runs_the_rows_of_those_that_go_so_deep() -> None:
    """After the first pass the prompt's chunk does not; after the second nobody does."""
    passes = row_passes("FLASH_ATTN")
    buffers = LaneBuffers(6, 2, 8, T, 3, torch.float32, "cpu")
    buffers.hidden.fill_(1)
    runs = np.array([[True, True], [True, False], [True, False], [False, False]])
    every, first, same, nobody = parts(batch(), runs, torch.device("cpu"))
    assert every is None and first is same and first is not None
    assert nobody is not None and not len(nobody.rows)
    assert first.rows.tolist() == [0] and first.requests.tolist() == [0]
    view = RowView(
        rows=4,
        padded=6,
        positions=torch.tensor([8, 0, 1, 2, 0, 0]),
        slots=torch.tensor([3, 40, 41, 42, -1, -1]),
        loop=torch.tensor([2, 1], dtype=torch.int32),
        seq_lens=torch.tensor([9, 3], dtype=torch.int32),
        part=first,
    )
    with override_forward_context(SimpleNamespace()):
        passes.run(batch(), buffers, view)
        context = get_forward_context()
    metadata = context.attn_metadata["layer.1"]
    assert context.cudagraph_runtime_mode == CUDAGraphMode.NONE
    assert metadata.block_table_tensor.tolist() == [[12, 13]]
    assert metadata.slot_mapping.tolist() == [3] and metadata.seq_lens.tolist() == [9]
    assert metadata.query_start_loc.tolist() == [0, 1]
    assert (metadata.num_reqs, metadata.num_actual_tokens, metadata.max_query_len) == (1, 1, 1)
    assert buffers.hidden[:, 0].tolist() == [9, 1, 1, 1, 1, 1]
    # Had the decoding request gone, the chunk's rows would be left.
    (other,) = parts(batch(), runs[1:2, ::-1].copy(), torch.device("cpu"))
    assert other is not None and other.rows.tolist() == [1, 2, 3]
    assert other.batch.query_start_loc_np.tolist() == [0, 3]


def test_a_backend_that_takes_the_bound_for_the_lengths_gets_no_bound(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashInfer plans from it, and would read positions that nobody has written."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    lengths = torch.tensor([9, 3], dtype=torch.int32)
    metadata = row_passes("FLASHINFER").metadata(
        batch(), torch.zeros_like(lengths), lengths, torch.arange(4), torch.arange(4)
    )["layer.0"]
    assert metadata.seq_lens_cpu_upper_bound is None
    assert torch.equal(metadata.seq_lens, lengths)
    assert "--attention-backend FLASH_ATTN" in caplog.text


def test_forward_is_one_pass_in_the_steps_buffers_or_a_step() -> None:
    class Model(OuroLaneModel):
        def __init__(self, buffers: LaneBuffers) -> None:
            self.lane_state = SimpleNamespace(buffers=buffers, stepping=False)

        def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids[:, None].float().expand(-1, 3)

        def model(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, None]:
            assert hidden.data_ptr() == self.lane_state.buffers.hidden.data_ptr()
            assert positions.data_ptr() == self.lane_state.buffers.row_positions.data_ptr()
            return hidden * positions[:, None], None

        __setattr__ = object.__setattr__

    model = Model(LaneBuffers(6, 2, 8, T, 3, torch.float32, "cpu"))
    out = model.forward(torch.tensor([1, 2]), torch.tensor([3, 4]))
    assert out[:, 0].tolist() == [3, 8]
    done = torch.ones(2, 3)
    step = SimpleNamespace(run=lambda: done)
    assert model.forward(torch.tensor([1]), torch.tensor([0]), lane_step=step) is done
