"""A request whose tokens stop at `max_loops` neither runs nor holds a loop after it."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest

from tests.cuda import bench
from tests.cuda.test_cramped import watch
from tests.engine.cases import CHECKPOINTS
from tests.engine.compare import assert_same
from tests.engine.harness import Arrival, Output, drive, generate, greedy, pages_by_loop
from tests.reference.model import Reference

LOOPS = 4
PLAIN: dict[str, Any] = {"logprobs": None}
FULL: dict[str, Any] = {"exit_threshold": 1.0, "exit_mode": "skip"}
pytestmark = bench.on("cramped")


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(CHECKPOINTS["t4-mha"])


@pytest.fixture(autouse=True)
def cold(llm: Any) -> None:
    """Every test starts with an empty cache."""
    assert llm.reset_prefix_cache()


def random_tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(count)]


def same(
    what: object, out: Output, prompt: list[int], depth: dict[str, Any], on: Reference
) -> None:
    """The answer is that of a prompt that ran every loop."""
    count = len(out.tokens)
    wanted = on.generate(
        prompt,
        count,
        threshold=depth.get("exit_threshold", 1.0),
        mode=depth.get("exit_mode", "skip"),
        max_loops=depth.get("max_loops"),
    )
    margins = [wanted.margin(index) for index in range(count)]
    assert_same(str(what), out.tokens, out.depths, wanted.tokens, wanted.depths, margins)


ASKED: list[dict[str, Any]] = [
    {"max_loops": loops, "exit_threshold": threshold, "exit_mode": mode}
    for loops in range(1, LOOPS)
    for threshold, mode in ((0.4, "skip"), (1.0, "skip"), (0.4, "exact"))
]


def test_in_chunks_preempted_and_cached_it_answers_as_if_it_had_run_every_loop(
    llm: Any, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside requests of every loop, first without and then with a cache."""
    seen = watch(llm, monkeypatch)
    asked = [*ASKED, {"exit_threshold": 0.4}, FULL]
    arrivals = [
        Arrival(str(n), random_tokens(n, 11 + 5 * n), greedy(16, depth, **PLAIN), n // 2)
        for n, depth in enumerate(asked)
    ]
    for _ in ("cold", "warm"):
        outputs = drive(llm, arrivals)
        for depth, arrival in zip(asked, arrivals, strict=True):
            out = outputs[arrival.name, 0]
            same(depth, out, list(arrival.prompt), depth, reference)
            deepest = depth.get("max_loops", LOOPS)
            later = [deepest] * 15 if depth.get("exit_mode") == "exact" else out.depths[1:]
            assert out.loops_run == [deepest, *later], depth
    assert seen["chunks"] >= 3 and seen["preempted"] >= 3, seen
    bench.assert_idle(llm)


@pytest.mark.parametrize(
    ("depth", "loops"),
    [
        ({"max_loops": 1}, 1),
        ({"max_loops": 3, "exit_mode": "exact"}, 3),
        ({"forced_depths": [2, 1]}, 2),
        ({"max_loops": 2, "exit_mode": "lossless"}, LOOPS),
        ({"exit_threshold": 0.3}, LOOPS),
    ],
    ids=str,
)
def test_what_it_holds_and_what_its_prompt_runs(
    llm: Any, depth: dict[str, Any], loops: int
) -> None:
    """Pages of the loops that it can read; passes of these, each over all rows of the prompt."""
    block, ran = type(bench.lane_state(llm).model.model), []

    def noting(self: Any, hidden: Any, positions: Any) -> Any:
        ran.append(len(hidden))
        return forward(self, hidden, positions)

    forward = block.forward
    llm.llm_engine.add_request(
        "held", {"prompt_token_ids": random_tokens(2, 20)}, greedy(8, depth, **PLAIN)
    )
    with mock.patch.object(block, "forward", noting):
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            held = pages_by_loop(llm)
            assert held in ([0] * LOOPS, [held[0]] * loops + [0] * (LOOPS - loops))
    assert ran == [20] * loops


def test_only_the_rows_that_go_on_run_the_deeper_loops(llm: Any, reference: Reference) -> None:
    """Two prompts of one step, one of which stops, beside a lane that decodes."""
    state = bench.lane_state(llm)
    depths: list[dict[str, Any]] = [{"exit_threshold": 0.4}, {"max_loops": 2}, FULL]
    lengths, counts = (6, 7, 9), (12, 4, 4)
    arrivals = [
        Arrival(str(n), random_tokens(20 + n, lengths[n]), greedy(counts[n], depth, **PLAIN), at)
        for n, (depth, at) in enumerate(zip(depths, (0, 3, 3), strict=True))
    ]
    reports: list[Any] = []
    note = state.note

    def noting(bill: Any, output: Any, tokens: Any) -> None:
        reports.append(output.report)
        note(bill, output, tokens)

    with mock.patch.object(state, "note", noting):
        outputs = drive(llm, arrivals)
    assert [17, 17, 10, 10] in [report.pass_rows for report in reports]
    for depth, arrival in zip(depths, arrivals, strict=True):
        same(depth, outputs[arrival.name, 0], list(arrival.prompt), depth, reference)
    ran = [LOOPS * 6, 2 * 7, LOOPS * 9]
    ran += [sum(outputs[arrival.name, 0].depths[1:]) for arrival in arrivals]
    assert sum(sum(report.rows_by_loop) for report in reports) == sum(ran)


def test_the_cache_gives_what_has_the_loops_that_are_needed(llm: Any, reference: Reference) -> None:
    prompt = random_tokens(3, 3 * bench.BLOCK + 5)
    for ran, loops, hits in ((1, 2, 0), (2, 1, 3), (2, 4, 0), (4, 3, 3)):
        assert llm.reset_prefix_cache()
        generate(llm, [prompt], greedy(1, {"max_loops": ran}, **PLAIN))
        depth = {"max_loops": loops}
        answer = llm.generate(
            {"prompt_token_ids": prompt}, greedy(8, depth, **PLAIN), use_tqdm=False
        )[0]
        assert answer.num_cached_tokens == hits * bench.BLOCK, (ran, loops)
        same((ran, loops), Output.of(answer.outputs[0]), prompt, depth, reference)


def test_log_probabilities_of_a_prompt_are_the_last_loops_all_the_same(
    llm: Any, reference: Reference
) -> None:
    prompt = random_tokens(5, 30)
    params = greedy(4, {"max_loops": 1}, prompt_logprobs=1)
    (answer,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    wanted = reference.prompt_states(prompt)[1][-1].log_softmax(-1)
    assert answer.prompt_logprobs is not None
    for position, entry in enumerate(answer.prompt_logprobs[1:], 1):
        assert entry is not None
        off = abs(entry[prompt[position]].logprob - float(wanted[position - 1, prompt[position]]))
        assert off <= 1e-4, position
