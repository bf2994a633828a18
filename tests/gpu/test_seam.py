"""The seam to vLLM's V2 runner, as far as it can be looked at without a GPU."""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config import CompilationConfig
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

from ouro_runtime.config import ExitParams, LoopConfig
from ouro_runtime.engine.config_hook import UnsupportedError
from ouro_runtime.engine.cuda import pieces
from ouro_runtime.engine.cuda import pin as gpu_pin
from ouro_runtime.engine.cuda import refuse as gpu_refuse
from ouro_runtime.engine.cuda.graphs import StepGraphs
from ouro_runtime.engine.cuda.lanes import STOPS, LaneBuffers, LaneParams, StepRecord
from ouro_runtime.engine.cuda.model import OuroLaneModel
from ouro_runtime.engine.cuda.output import LaneOutput, StepBill
from ouro_runtime.engine.cuda.requests import LaneRequests
from ouro_runtime.engine.cuda.runner import OuroGPUModelRunner, OuroGPUWorker
from ouro_runtime.engine.cuda.sampler import StepSampling
from ouro_runtime.engine.cuda.state import OuroModelState
from ouro_runtime.engine.pin import SeamError
from ouro_runtime.engine.step_output import unpack_cdf


def test_vllm_is_as_the_seam_was_written_for() -> None:
    gpu_pin.check()


def test_a_moved_seam_is_named() -> None:
    with pytest.raises(SeamError, match=r"StepBill no longer has colour"):
        gpu_pin.fields(StepBill, "rows", "colour")
    with pytest.raises(SeamError, match=r"no longer uses"):
        gpu_pin.mentions(test_a_moved_seam_is_named, "mentions(", "nowhere" + "_else")


def test_without_vllms_gpu_modules_the_error_says_so() -> None:
    gone = {"vllm.v1.worker.gpu_worker": None}
    with mock.patch.dict(sys.modules, gone), pytest.raises(RuntimeError, match="GPU modules"):
        gpu_pin.check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_the_worker_says_so() -> None:
    worker = OuroGPUWorker.__new__(OuroGPUWorker)
    worker.use_v2_model_runner = True
    with pytest.raises(RuntimeError, match="no CUDA device"):
        worker._make_model_runner()


def test_the_worker_refuses_the_old_runner() -> None:
    worker = OuroGPUWorker.__new__(OuroGPUWorker)
    worker.use_v2_model_runner = False
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        pytest.raises(RuntimeError, match="V2 model runner"),
    ):
        worker._make_model_runner()


def test_vllm_finds_the_model_state() -> None:
    model = OuroLaneModel.__new__(OuroLaneModel)
    assert resolve_model_state_cls(None, model) is OuroModelState


def test_vllm_never_replays_a_graph_of_the_whole_forward() -> None:
    state = OuroModelState.__new__(OuroModelState)
    support, backend = state.get_additional_cg_support()
    config = CompilationConfig(
        mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE
    )
    config.set_splitting_ops_for_v1("naive", 1)
    mode = config.resolve_cudagraph_mode_and_sizes(support, backend, 1, True)
    assert mode == CUDAGraphMode.PIECEWISE


def test_logits_are_the_steps_while_one_waits_for_its_output() -> None:
    class Model(OuroLaneModel):
        def __init__(self) -> None:
            self.lane_state = None

        def read_out(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + 1

        __setattr__ = object.__setattr__

    model, hidden, late = Model(), torch.zeros(2, 3), torch.ones(1, 3)
    assert torch.equal(model.compute_logits(hidden), hidden + 1)
    model.lane_state = SimpleNamespace(stepping=True, late_logits=lambda: late)
    assert model.compute_logits(hidden) is late
    model.lane_state.stepping = False
    assert torch.equal(model.compute_logits(hidden), hidden + 1)


def test_without_graphs_a_pass_is_as_wide_as_its_lanes() -> None:
    graphs = StepGraphs(torch.device("cpu"))
    assert graphs.width(5) == 5
    assert not graphs.replay("block", 5)
    graphs.buckets = (1, 4, 8)
    assert [graphs.width(n) for n in (1, 2, 8, 9)] == [1, 4, 8, 9]
    graphs.release()
    assert graphs.width(2) == 2


def test_lane_parameters_survive_the_journey() -> None:
    rng = np.random.default_rng(0)
    lanes = 5
    flags = rng.random((3, lanes)) < 0.5
    params = LaneParams(
        threshold=rng.random(lanes, np.float32),
        limit=rng.integers(1, 1 << 30, lanes),
        run_all=flags[0],
        once=flags[1],
        decoding=flags[2],
        slot=rng.permutation(lanes),
        deepest=rng.integers(1, 5, lanes),
        temperature=rng.random(lanes, np.float32),
        seed=rng.integers(-(1 << 63), (1 << 63) - 1, lanes),
        stops=rng.integers(-1, 50_000, (lanes, STOPS)),
        low=rng.integers(1, 5, (4, lanes)),
        high=rng.integers(1, 5, (4, lanes)),
    )
    packed = torch.from_numpy(params.pack(lanes + 2, 77))
    assert len(packed) == LaneParams.rows(4)
    columns = LaneParams.unpack(packed)
    for name, value in columns.items():
        assert np.array_equal(value.numpy()[..., :lanes].T, getattr(params, name).T) or (
            name == "stops" and np.array_equal(value.numpy()[:lanes], params.stops)
        ), name
    assert columns["threshold"].dtype == torch.float32
    # What pads can do nothing: no request, no position that may be entered.
    assert columns["slot"][lanes:].tolist() == [77, 77] and not columns["limit"][lanes:].any()


def test_a_record_takes_tokens_of_those_that_were_read() -> None:
    record = StepRecord.empty(3, 2, torch.device("cpu"))
    lanes = torch.tensor([0, 2])
    for token, read in ((10, [True, False]), (20, [True, True])):
        record.add(
            lanes,
            torch.tensor(read),
            torch.tensor([token, token + 1]),
            torch.tensor([1, 2], dtype=torch.int32),
        )
    assert record.count.tolist() == [2, 0, 1]
    assert record.tokens.tolist() == [[10, 20], [0, 0], [21, 0]]
    assert record.depths.tolist() == [[1, 1], [0, 0], [2, 0]]


def test_what_a_step_hands_over_is_its_own() -> None:
    """It is copied to the host while the next step already writes into the record."""
    record = StepRecord.empty(2, 3, torch.device("cpu"))
    sampling = StepSampling.__new__(StepSampling)
    sampling.batch = SimpleNamespace(idx_mapping=torch.tensor([1, 0]))
    sampling.history = sampling.logprobs = None
    output, packed = sampling.output(record), record.packed()
    for field in fields(record):
        getattr(record, field.name).fill_(7)
    for brought in (output.sampled_token_ids, output.num_sampled, output.num_rejected):
        assert not brought.any()
    assert not packed[:, :5].any()


def test_every_watched_stop_ends_its_lane() -> None:
    requests = LaneRequests(2, LoopConfig(4, ExitParams(1.0, 1, 4, "skip")), 32)
    stops = [3 * number for number in range(1, STOPS + 1)]
    requests.add(1, "a", SamplingParams(max_tokens=9, stop_token_ids=stops), 3, 3)
    assert sorted(requests.stops[1].tolist()) == stops
    lanes, tokens = torch.arange(STOPS + 1), torch.tensor([*stops, 4])
    buffers = LaneBuffers(len(lanes), len(lanes), len(lanes), 4, 2, torch.float32, "cpu")
    buffers.stops.copy_(torch.from_numpy(requests.stops[1]))
    pieces.take(buffers, lanes, lanes != 2, tokens)
    assert buffers.finished.tolist() == [lane not in (2, STOPS) for lane in lanes.tolist()]


def test_the_bill_counts_what_ran() -> None:
    record = StepRecord.empty(3, 4, torch.device("cpu"))
    # One loop was done: leaves at 2, at 1, and is one loop deep. Exact: read out at 3, ran all. The
    # end of a prompt of 5.
    record.depths[:, :2] = torch.tensor([[2, 1], [3, 0], [2, 0]])
    record.start[0] = record.end[0] = 1
    record.history[0, 0, :2] = torch.tensor([0.75, 0.5])
    record.history[0, 1, :2] = torch.tensor([0.25, 0.5])
    record.history[1, 2] = torch.tensor([1.0, 0.5, 0.25, 0.125])
    record.history[2, 1, :2] = torch.tensor([0.875, 0.5])
    packed = record.packed()
    bill = StepBill(
        ["a", "b", "c"],
        [1, 1, 1],
        packed,
        least=np.array([0, 4, 4]),
        decoding=np.array([True, True, False]),
        rows=np.array([7, 7, 7, 7]),
        filled=np.array([5, 5, 5, 5]),
        loops=4,
    )
    out = bill.settle(packed.numpy(), np.array([2, 1, 1]))
    assert {name: out.depths(name) for name in out.notes} == {"a": [2, 1], "b": [3], "c": [2]}
    loops_run = {name: notes[:, 1].tolist() for name, notes in out.notes.items()}
    assert loops_run == {"a": [2, 1], "b": [4], "c": [4]}
    assert {name: unpack_cdf(notes) for name, notes in out.notes.items()} == {
        "a": [[0.25, 0.5], [0.75]],
        "b": [[0.0, 0.5, 0.75]],
        "c": [[0.125, 0.5]],
    }
    # Five prompt rows and the exact lane at every loop; the first lane at 2, 1 and 1.
    assert out.report.rows_by_loop == [6 + 2, 6 + 1, 6, 6]
    assert out.report.pass_rows == [7] * 4
    assert out.report.tokens == 4


def test_depths_are_noted_once_however_often_an_output_is_asked_for() -> None:
    noted: list[Any] = []
    output = LaneOutput.__new__(LaneOutput)
    output._inner = SimpleNamespace(get_output=lambda: SimpleNamespace(sampled_token_ids=[[5]]))
    output._bill = SimpleNamespace(settle=lambda packed, count: (packed, count.tolist()))
    output._note = lambda bill, settled, tokens: noted.append((settled, tokens))
    output._event = SimpleNamespace(synchronize=lambda: None)
    output._packed, output._settled = "packed", None
    assert [output.get_output().ouro for _ in range(2)] == [("packed", [1])] * 2
    assert noted == [(("packed", [1]), [[5]])]


@pytest.mark.parametrize(("in_flight", "read"), [(1, [1, 2, 3]), (2, [1, 2])])
def test_a_process_that_nobody_asks_reads_its_outputs_in_time(
    in_flight: int, read: list[int]
) -> None:
    runner = OuroGPUModelRunner.__new__(OuroGPUModelRunner)
    runner.vllm_config = SimpleNamespace(max_concurrent_batches=in_flight)
    runner._unread = deque()
    seen: list[int] = []
    for step in (1, 2, 3):
        runner._read_unasked(SimpleNamespace(get_output=partial(seen.append, step)))
    assert seen == read


def test_memory_of_the_profiled_graphs_goes_back_when_it_is_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM empties the allocator's cache before we let go: it must be emptied again."""
    done: list[str] = []
    monkeypatch.setattr(
        GPUModelRunner, "profile_cudagraph_memory", lambda self: done.append("vLLM") or 7
    )
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: done.append("empty"))
    runner = OuroGPUModelRunner.__new__(OuroGPUModelRunner)
    runner.model_state = SimpleNamespace(release=lambda: done.append("release"))
    assert runner.profile_cudagraph_memory() == 7
    assert done == ["vLLM", "release", "empty"]


@pytest.mark.parametrize(
    ("captured", "said"),
    [
        ((), "decoding runs WITHOUT CUDA graphs"),
        ((1, 2, 512), "--max-cudagraph-capture-size 600"),
        ((1, 600), ""),
    ],
)
def test_decoding_without_graphs_is_said_loudly(
    captured: tuple[int, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(GPUModelRunner, "capture_model", lambda self, profile_only: 0)
    runner = OuroGPUModelRunner.__new__(OuroGPUModelRunner)
    runner.max_num_reqs = 600
    runner.compilation_config = CompilationConfig(mode=CompilationMode.NONE)
    runner.model_state = SimpleNamespace(graphs=SimpleNamespace(buckets=captured))
    runner.capture_model(profile_only=True)
    assert not caplog.text
    runner.capture_model()
    assert said in caplog.text and bool(said) == bool(caplog.text)


def vllm_config(**options: Any) -> Any:
    options = {"enforce_eager": False, "cudagraph_mode": None} | options
    return SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=options["enforce_eager"]),
        compilation_config=SimpleNamespace(cudagraph_mode=options["cudagraph_mode"]),
    )


@pytest.mark.parametrize("name", ["VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_BATCH_INVARIANT"])
def test_graphs_that_would_replace_a_step_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_refuse.refuse(vllm_config())
    monkeypatch.setenv(name, "1")
    with pytest.raises(UnsupportedError, match=name):
        gpu_refuse.refuse(vllm_config(cudagraph_mode=CUDAGraphMode.PIECEWISE))
    with pytest.raises(UnsupportedError, match=name):
        OuroGPUModelRunner(vllm_config(), torch.device("cpu"))


def test_without_graphs_nothing_can_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    gpu_refuse.refuse(vllm_config(enforce_eager=True))
    gpu_refuse.refuse(vllm_config(cudagraph_mode=CUDAGraphMode.NONE))


def test_a_request_that_comes_back_does_not_cross_with_its_late_depths() -> None:
    """Depths come back in one thread while the request is admitted anew in another."""
    config = LoopConfig(4, ExitParams(1.0, 1, 4, "skip"))
    requests = LaneRequests(2, config, 32)
    requests.add(0, "a", SamplingParams(max_tokens=9), 3, 3)
    again = threading.Thread(target=requests.add, args=(1, "a", SamplingParams(max_tokens=9), 3, 3))

    class Epochs(dict[str, int]):
        def get(self, *args: Any) -> Any:
            seen = super().get(*args)
            if threading.current_thread() is not again and not again.ident:
                again.start()
                again.join(timeout=0.2)
            return seen

    requests._epoch = Epochs(requests._epoch)
    requests.note("a", 1, [2, 3])
    again.join()
    assert requests._depths == {"a": []}, "void depths were noted"


def test_depths_of_a_request_that_is_gone_are_dropped() -> None:
    config = LoopConfig(4, ExitParams(1.0, 1, 4, "skip"))
    requests = LaneRequests(2, config, 32)
    requests.add(0, "a", SamplingParams(max_tokens=9), 3, 3)
    requests.note("a", 1, [2, 3])
    requests.add(1, "a", SamplingParams(max_tokens=9), 3, 4)
    requests.note("a", 1, [4])
    assert requests._depths == {"a": [2]}
    requests.forget(["a"])
    requests.note("a", 2, [1])
    assert requests._depths == {}
