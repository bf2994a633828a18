"""The pieces that a GPU captures: alone enough for plain requests, and fit to be captured."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from vllm.sampling_params import StructuredOutputsParams

from ouro_runtime.engine.cuda import graphs
from tests.cuda import bench
from tests.engine.cases import Case, golden_cases
from tests.engine.compare import assert_cdf
from tests.engine.harness import Arrival, drive, generate, greedy
from tests.engine.mixes import gate_fields, tokens

TEXT = list(b"how now")
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


class Replay:
    """In the place of a CUDA graph: runs what was given to be recorded, and counts."""

    def __init__(self, played: Counter[int], run: Callable[[int], None], lanes: int) -> None:
        self.played, self.run, self.lanes = played, run, lanes

    def replay(self) -> None:
        self.played[self.lanes] += 1
        self.run(self.lanes)


@pytest.fixture
def captured(llm: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """The engine as it is after the capture, with what was played by number of lanes."""
    state, played = bench.lane_state(llm), Counter[int]()
    monkeypatch.setattr(graphs, "graph_capture", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(state.graphs, "_record", partial(Replay, played))
    config = state.vllm_config.compilation_config
    monkeypatch.setattr(config, "cudagraph_capture_sizes", [1, 8])
    # Between profiling and the capture vLLM runs requests of its own; their numbers are left.
    state.buffers.params.fill_(1 << 20)
    state.capture_inner_cudagraphs(None, None, None, None)
    assert not played and not state.buffers.carried_loop.any()
    yield played
    state.graphs.release()


@bench.on("t4")
def test_golden_cases_by_replays_of_what_was_captured(llm: Any, captured: Counter[int]) -> None:
    cases = some()
    check(llm, cases[:1])
    assert captured.keys() == {1}
    check(llm, cases[1:6])
    assert captured.keys() == {1, 8}


@bench.on("t4")
def test_drafts_by_replays_of_what_was_captured(llm: Any, captured: Counter[int]) -> None:
    """A request has four lanes, in a bucket of eight."""
    state = bench.lane_state(llm)
    assert state.graphs.draft_buckets == (8,)
    (case, *_) = golden_cases("t4-mha", ("full",))
    depth, played = {"exit_mode": "lossless", "exit_threshold": 0.0}, Counter[str]()
    replay = state.engine.replay

    def noting(piece: str, lanes: int) -> bool:
        there = replay(piece, lanes)
        played[piece] += there
        return there

    params = greedy(len(case.tokens), depth, **PLAIN)
    with mock.patch.object(state.engine, "replay", noting):
        (out,) = generate(llm, [case.prompt], [params])
    assert tuple(out.tokens) == case.tokens and any(out.drafts)
    steps = played["draft_begin"]
    assert steps > 2 and played["draft_carry"] == steps
    assert all(played[f"draft_{piece}"] == 4 * steps for piece in ("block", "read", "advance"))
    assert captured[8] == (2 + 3 * 4) * steps


@bench.on("t4")
def test_a_prompt_beside_lanes_is_no_step_that_was_captured(
    llm: Any, captured: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where there is a graph of as many lanes: their states lie elsewhere."""
    cases = [case for case in golden_cases("t4-mha", ("skip",)) if len(case.prompt) in (5, 17)]
    cases = sorted(cases, key=lambda case: -sum(case.depths))[:8]
    arrivals = [
        Arrival(case.name, case.prompt, greedy(24, case.depth_fields, **PLAIN), 4 * (index == 7))
        for index, case in enumerate(cases)
    ]
    state, seen = bench.lane_state(llm), Counter[tuple[int, bool]]()
    prepare = state._prepare_step

    def noting(batch: Any) -> Any:
        seen[batch.num_reqs, batch.is_prefilling_np.sum() == 1] += 1
        return prepare(batch)

    monkeypatch.setattr(state, "_prepare_step", noting)
    outputs = drive(llm, arrivals)
    assert seen[8, True] and captured[8], "no prompt came to seven lanes"
    for case in cases:
        out = outputs[case.name, 0]
        assert (out.tokens, out.depths) == (list(case.tokens), list(case.depths)), case.name


@bench.on("t4")
def test_a_grammar_beside_plain_requests_has_its_token_sampled_after_the_step(llm: Any) -> None:
    depth = {"exit_threshold": 0.3}
    choice = StructuredOutputsParams(choice=["north", "west"])
    bound = greedy(12, depth, **PLAIN, ignore_eos=False, structured_outputs=choice)
    plain = greedy(12, depth, **PLAIN)
    both, (alone,) = generate(llm, [TEXT, TEXT], [bound, plain]), generate(llm, [TEXT], [plain])
    said = bytes(both[0].tokens[: len(both[0].tokens) - (both[0].tokens[-1] < 5)])
    assert said in (b"north", b"west")
    assert both[1].tokens == alone.tokens


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


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("llm", ["t4", "cramped"], indirect=True)
def test_a_crowd_that_comes_and_goes_by_the_pieces_alone(llm: Any, seed: int) -> None:
    """Slots, lanes and buckets are taken over from others; clients leave in mid-step."""
    rng = random.Random(seed)
    arrivals = []
    for index in range(24):
        options: dict[str, Any] = rng.choice([{}, {"temperature": 0.8, "seed": index}])
        stops = rng.sample(range(5, 250), 3) if rng.random() < 0.3 else []
        params = greedy(
            rng.randint(1, 16), gate_fields(rng), **PLAIN, **options, stop_token_ids=stops
        )
        gone = rng.randint(1, 9) if rng.random() < 0.25 else None
        ids = tokens(rng, rng.choice([1, 2, 5, 17, 24, 25, 40]))
        arrivals.append(Arrival(str(index), ids, params, rng.randrange(30), gone))
    state = bench.lane_state(llm)
    with mock.patch.object(
        state.graphs, "buckets", rng.choice([(), (1, 2, 4, state.max_num_reqs)])
    ):
        seen = drive(llm, arrivals)
        bench.assert_idle(llm)
        for arrival in arrivals:
            (alone,) = generate(llm, [arrival.prompt], [arrival.params])
            out = seen.get((arrival.name, 0))
            assert out is not None or arrival.abort_after is not None
            if out is not None:
                end = len(out.tokens) if arrival.abort_after is not None else None
                what = (arrival.name, arrival.params)
                assert out.tokens == alone.tokens[:end], what
                assert out.depths == alone.depths[:end], what
                assert_cdf(str(what), out.exit_cdf, alone.exit_cdf[:end])
