"""The pieces that a GPU captures: alone enough for plain requests, and fit to be captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

from tests.cuda import bench
from tests.engine.cases import Case, golden_cases
from tests.engine.harness import generate, greedy

PLAIN: dict[str, Any] = {"logprobs": None}
"""Without what `greedy` asks for beyond the read-out piece."""


def some() -> list[Case]:
    cases = [case for case in golden_cases("t4-mha") if len(case.prompt) < 9][::4]
    assert {case.mode for case in cases} == {"full", "exact", "skip"}
    return cases


def check(llm: Any, cases: Sequence[Case]) -> None:
    params = [greedy(len(case.tokens), case.depth_fields, **PLAIN) for case in cases]
    outputs = generate(llm, [case.prompt for case in cases], params)
    for case, out in zip(cases, outputs, strict=True):
        assert (out.tokens, out.depths) == (list(case.tokens), list(case.depths)), case.name
    bench.assert_idle(llm)


@bench.on("t4")
def test_golden_cases_by_the_pieces_alone(llm: Any) -> None:
    state = bench.lane_state(llm)
    sampled = mock.Mock(wraps=state.sampler.sample)
    for buckets in ((), (2, 16)):
        with (
            mock.patch.object(state.graphs, "buckets", buckets),
            mock.patch.object(state.sampler, "sample", sampled),
        ):
            check(llm, some())
    # Where prompts end: those come in mixed batches.
    assert sampled.call_count <= 2 * state.loops


@bench.on("t4")
def test_pieces_can_be_captured_whatever_ran_before(llm: Any) -> None:
    """Between profiling and the capture vLLM runs requests of its own; their numbers are left."""
    state = bench.lane_state(llm)
    check(llm, some()[:3])
    state.buffers.params.fill_(1 << 20)
    played = []

    def capture(buckets: Sequence[int], pieces: Mapping[str, Callable[[int], None]]) -> None:
        for lanes in sorted(buckets, reverse=True):
            for name, run in pieces.items():
                run(lanes)
                run(lanes)
                played.append((name, lanes))

    config = state.vllm_config.compilation_config
    with (
        mock.patch.object(state.graphs, "capture", capture),
        mock.patch.object(config, "cudagraph_capture_sizes", [1, 4, 8]),
    ):
        state.capture_inner_cudagraphs(None, None, None, None)
    assert {name for name, _ in played} == {"begin", "block", "read", "advance", "carry"}
    assert {lanes for _, lanes in played} == {1, 4, 8}
    # Nobody's state was touched, and the next requests are as right as the first.
    assert not state.buffers.carried_loop.any()
    check(llm, some()[:3])


@bench.on("t4")
def test_greedy_and_tempered_requests_need_no_sampler_between_passes(llm: Any) -> None:
    """Every read-out of such a batch is the captured piece; any other option is vLLM's sampler."""
    state = bench.lane_state(llm)
    sampled = mock.Mock(wraps=state.sampler.sample)
    depth = {"exit_threshold": 0.4}
    prompts = [[9, 8, 7], [9, 8, 7], [5, 6]]
    tempered = PLAIN | {"temperature": 0.7, "seed": 3}
    plain = [greedy(12, depth, **PLAIN), greedy(12, depth, **tempered), greedy(12, **PLAIN)]
    with mock.patch.object(state.sampler, "sample", sampled):
        first = generate(llm, prompts, plain)
        prefills = sampled.call_count
        assert prefills <= state.loops
        others = [greedy(12, depth, **tempered, top_k=200), greedy(12, **PLAIN, min_tokens=3)]
        second = generate(llm, [*prompts, [1, 2], [3]], [*plain, *others])
    assert sampled.call_count > prefills + 12
    # In the same crowd with requests that need the sampler the tokens are the same.
    assert [out.tokens for out in first] == [out.tokens for out in second[:3]]
