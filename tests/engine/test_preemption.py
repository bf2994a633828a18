"""Preempted again and again, a request gives what it gives undisturbed."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm import LLM

from tests.engine.cases import CHECKPOINTS
from tests.engine.compare import LOGPROB_TOLERANCE, assert_same
from tests.engine.harness import (
    BLOCK,
    Output,
    assert_idle,
    count_preemptions,
    engine,
    generate,
    greedy,
    scheduler_of,
)
from tests.reference.model import Reference

CHECKPOINT, LOOPS = CHECKPOINTS["t4-mha"], 4
REQUESTS, TOKENS = 10, 60


def workload() -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Prompts and depth controls: forced depths, thresholds and full depth, in both modes."""
    rng = random.Random(11)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(5, 40))] for _ in range(REQUESTS)]
    depth: list[dict[str, Any]] = []
    for number in range(REQUESTS):
        mode = {"exit_mode": "exact" if number % 4 == 3 else "skip"}
        if number % 3 == 0:
            depth.append({"forced_depths": [rng.randint(1, LOOPS) for _ in range(17)]} | mode)
        else:
            depth.append({"exit_threshold": [0.2, 0.5, 1.0][number % 3]} | mode)
    return prompts, depth


def run(llm: LLM, **sampling: Any) -> list[Output]:
    prompts, depth = workload()
    params = [greedy(TOKENS, fields, seed=7, **sampling) for fields in depth]
    outputs = generate(llm, prompts, params)
    assert_idle(llm)
    return outputs


@pytest.fixture(scope="module")
def undisturbed() -> dict[float, list[Output]]:
    with engine(CHECKPOINT) as llm:
        preempted = count_preemptions(llm)
        outputs = {temperature: run(llm, temperature=temperature) for temperature in (0.0, 1.0)}
        assert not preempted
    return outputs


@pytest.mark.parametrize("blocks", [5, 8])
@pytest.mark.parametrize("caching", [False, True], ids=["uncached", "cached"])
def test_preempted_equals_undisturbed(
    undisturbed: dict[float, list[Output]], blocks: int, caching: bool
) -> None:
    options = {
        "blocks": blocks,
        "max_model_len": 128,
        "max_num_batched_tokens": 96,
        "max_num_seqs": 8,
        "enable_prefix_caching": caching,
    }
    with engine(CHECKPOINT, **options) as llm:
        preempted = count_preemptions(llm)
        for temperature, expected in undisturbed.items():
            before = len(preempted)
            outputs = run(llm, temperature=temperature)
            assert len(preempted) - before >= 5, f"{len(preempted) - before} preemptions"
            for number, (out, want) in enumerate(zip(outputs, expected, strict=True)):
                what = f"request {number} at temperature {temperature}"
                assert_same(what, out.tokens, out.depths, want.tokens, want.depths)
                assert out.loops_run == want.loops_run, what
                for index, (left, right) in enumerate(
                    zip(out.logprobs, want.logprobs, strict=True)
                ):
                    off = abs(left - right)
                    assert off <= LOGPROB_TOLERANCE, f"{what}: token {index} is off by {off}"
        assert max(map(preempted.count, preempted)) >= 2, "no request was preempted twice"


def test_what_was_planned_and_never_computed_is_shared_with_nobody() -> None:
    """By priority a request loses its pages in the step that was to fill one of them; then it, and
    others with its prompt, find that page in no cache."""
    rng, reference = random.Random(0), Reference(CHECKPOINT)
    options = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "long_prefill_token_threshold": BLOCK,
        "num_gpu_blocks_override": 11,
        "scheduling_policy": "priority",
    }
    depth = {"max_loops": 1}
    with engine(CHECKPOINT, enable_prefix_caching=True, **options) as llm:
        preempted, planned = note_planned(llm), 0
        for length in (46, 47, 48, 49):
            low, high = ([rng.randrange(256) for _ in range(n)] for n in (230, length))
            asked = {"low": (low, greedy(6, depth), 5), "high": (high, greedy(16, depth), 0)}
            seen: dict[str, Output] = {}
            for name, (prompt, params, priority) in asked.items():
                request = {"prompt_token_ids": prompt}
                llm.llm_engine.add_request(name, request, params, priority=priority)
                llm.llm_engine.step()
            while llm.llm_engine.has_unfinished_requests():
                for answer in llm.llm_engine.step():
                    seen[answer.request_id] = Output.of(answer.outputs[0])
            planned += sum(preempted)
            preempted.clear()
            for name, (prompt, params, _) in asked.items():
                wanted = reference.generate(prompt, params.max_tokens, max_loops=1, mode="skip")
                margins = [wanted.margin(index) for index in range(params.max_tokens)]
                out = seen[name]
                both = (out.tokens, out.depths, wanted.tokens, wanted.depths)
                assert_same(f"{name} beside {length}", *both, margins)
        assert planned >= 2
        assert_idle(llm)


def note_planned(llm: LLM) -> list[int]:
    """A list that grows with every preemption by the pages that were published and not filled."""
    scheduler, planned = scheduler_of(llm), []
    preempt = scheduler._preempt_request

    def noting(request: Any, *args: Any, **kwargs: Any) -> Any:
        (pages, *_) = scheduler.kv_cache_manager.get_blocks(request.request_id).blocks
        empty = pages[request.num_computed_tokens // BLOCK :]
        planned.append(sum(page.block_hash is not None for page in empty))
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = noting
    return planned
