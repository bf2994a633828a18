"""One request never touches another: what a row asked for, and whose K/V a block holds."""

from __future__ import annotations

import random
import time
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from ouro_runtime.config import DepthError, ExitParams, LoopConfig
from ouro_runtime.engine import features
from ouro_runtime.engine.config_hook import UnsupportedError
from ouro_runtime.engine.cpu import row_state
from ouro_runtime.engine.pin import SeamError
from tests.engine.cases import CHECKPOINTS
from tests.engine.compare import assert_same
from tests.engine.harness import (
    BLOCK,
    Output,
    engine,
    generate_one,
    greedy,
    make_engine,
    scheduler_of,
)

CHECKPOINT, LOOPS = CHECKPOINTS["t4-mha"], 4
FULL = {"exit_threshold": 1.0}
CONFIG = LoopConfig(4, ExitParams(1.0, 1, 4, "skip"))


def run_preempting(llm: LLM, prompt: list[int], params: SamplingParams, after: int) -> Output:
    """One request, preempted once it has `after` tokens."""
    scheduler, params = scheduler_of(llm), params.clone()
    params.output_kind = RequestOutputKind.CUMULATIVE
    llm.llm_engine.add_request("preempted", {"prompt_token_ids": prompt}, params)
    out, preempted = None, False
    while llm.llm_engine.has_unfinished_requests():
        for answer in llm.llm_engine.step():
            out = Output.of(answer.outputs[0])
        if out is not None and not preempted and len(out.tokens) >= after:
            (request,) = scheduler.running
            scheduler.running.remove(request)
            scheduler._preempt_request(request, time.monotonic())
            preempted = True
    assert preempted and out is not None
    return out


@pytest.mark.parametrize("mode", ["skip", "exact"])
def test_a_preempted_request_and_who_has_its_tokens_as_prompt_leave_each_other_alone(
    mode: str,
) -> None:
    """Another's full-depth blocks hold what a skipping request generated, with other K/V: neither
    may the one come back to them, nor pay its debts into them."""
    rng = random.Random(3)
    prompt = [rng.randrange(256) for _ in range(20)]
    depth = {"forced_depths": [1, 2, 1, 3], "exit_mode": mode}
    params, least = greedy(90, depth), greedy(6, FULL)
    with engine(CHECKPOINT, enable_prefix_caching=True) as llm:
        alone = generate_one(llm, prompt, params)
        chat = prompt + alone.tokens[:80]
        assert llm.reset_prefix_cache()
        cold = generate_one(llm, chat, least)
        assert llm.reset_prefix_cache()

        generate_one(llm, chat, least)
        published = len(scheduler_of(llm).kv_cache_manager.block_pool.cached_block_hash_to_block)
        assert published == LOOPS * (len(chat) // BLOCK)
        out = run_preempting(llm, prompt, params, after=70)
        assert_same("preempted", out.tokens, out.depths, alone.tokens, alone.depths)
        warm = generate_one(llm, chat, least)
        assert_same("reader", warm.tokens, warm.depths, cold.tokens, cold.depths)
        for ours, theirs in zip(warm.logprobs, cold.logprobs, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_preempted_request_of_full_depth_comes_back_to_its_own_blocks() -> None:
    rng = random.Random(4)
    prompt = [rng.randrange(256) for _ in range(20)]
    with engine(CHECKPOINT, enable_prefix_caching=True) as llm:
        alone = generate_one(llm, prompt, greedy(90, FULL))
        hits: list[int] = []
        scheduler = scheduler_of(llm)
        lookup = scheduler._get_local_prefix_cache_hit

        def noting(request: Any) -> Any:
            found = lookup(request)
            hits.append(found[1])
            return found

        scheduler._get_local_prefix_cache_hit = noting
        out = run_preempting(llm, prompt, greedy(90, FULL), after=70)
    assert_same("preempted", out.tokens, out.depths, alone.tokens, alone.depths)
    assert hits[-1] >= 2 * BLOCK, f"hits {hits}: recomputed what the cache has"


@pytest.mark.parametrize("backend", ["native", "lmcache"])
def test_kv_offloading_is_refused_like_any_connector(backend: str) -> None:
    with pytest.raises((UnsupportedError, ValueError), match="does not support K/V transfer"):
        make_engine(CHECKPOINT, kv_offloading_size=1.0, kv_offloading_backend=backend)


def test_a_connector_that_appears_after_the_configuration_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever makes it, and when: the scheduler is the last to see it."""
    from vllm.v1.core.sched import scheduler

    init = scheduler.Scheduler.__init__

    def late(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.connector = object()

    monkeypatch.setattr(scheduler.Scheduler, "__init__", late)
    with pytest.raises(UnsupportedError, match="does not support K/V transfer"):
        make_engine(CHECKPOINT)


def test_a_prompt_that_grows_is_refused() -> None:
    with engine(CHECKPOINT) as llm:
        processor = llm.llm_engine.input_processor
        with pytest.raises(DepthError, match="streaming input is not supported"):
            processor.process_inputs(
                "grows", {"prompt_token_ids": [5, 6]}, greedy(4), ("generate",), resumable=True
            )


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"exit_treshold": 0.5}, "exit_treshold"),
        ({"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params"),
        ({"exit_threshold": 0.5, 7: 1}, "7"),
    ],
    ids=str,
)
def test_extra_args_that_nobody_reads_are_refused_by_name(extra: dict, named: str) -> None:
    with pytest.raises(DepthError) as caught:
        features.check(
            SamplingParams(extra_args=extra), CONFIG, resumable=False, open_args=False, on_cpu=True
        )
    assert caught.value.param == named and named in str(caught.value)


@pytest.mark.parametrize("rule", ["margin", "delta"])
def test_an_engine_that_reads_no_loops_refuses_rules_that_do(rule: str) -> None:
    params = SamplingParams(extra_args={"exit_rule": rule, "exit_threshold": 0.5})
    options = {"resumable": False, "open_args": False}
    features.check(params, CONFIG, on_cpu=True, **options)
    with pytest.raises(DepthError, match=f"exit_rule '{rule}' is not supported on CUDA yet"):
        features.check(params, CONFIG, on_cpu=False, **options)


def test_extra_args_of_a_users_logits_processor_pass() -> None:
    params = SamplingParams(extra_args={"target_token": 5})
    features.check(params, CONFIG, resumable=False, open_args=True, on_cpu=True)


def test_every_field_that_vllm_keeps_by_row_is_mapped_or_refused() -> None:
    assert set(row_state.METADATA) == {field.name for field in fields(SamplingMetadata)}
    known = {"MinTokensLogitsProcessor", "LogitBiasLogitsProcessor", "MinPLogitsProcessor"}
    assert {kind.__name__ for kind in BUILTIN_LOGITS_PROCESSORS} == known


def test_a_thinking_budget_is_of_its_request_whatever_row_that_is_in() -> None:
    """As of the rows of a pass; and vLLM leaves one behind in row 1, and forgets one in row 0."""
    holder = ThinkingBudgetStateHolder(None, 4, 0, torch.device("cpu"), False)
    old, new, left, fresh = ({"name": name} for name in ("old", "new", "left", "fresh"))
    holder._state = {0: new, 1: left, 2: fresh, 3: left}
    metadata = SimpleNamespace(thinking_budget_state_holder=holder)
    requests: list[Any] = [SimpleNamespace(budget=budget) for budget in (old, None, None)]
    params = [SamplingParams(thinking_token_budget=budget) for budget in (3, None, 4)]
    row_state.follow_budgets(metadata, params, requests)  # type: ignore[arg-type]
    assert holder._state == {0: old, 2: fresh}
    assert [request.budget for request in requests] == [old, None, fresh]
    view = row_state._Subset(np.array([2, 1]), 3).budgets(holder)
    assert view._state == {0: fresh} and view._state[0] is fresh


@pytest.mark.parametrize("found", [{"a"}, {"a", "b", "c"}])
def test_a_field_that_vllm_grows_or_drops_fails_loudly(found: set[str]) -> None:
    with pytest.raises(SeamError, match="Metadata of vLLM has other fields"):
        row_state.check_names("Metadata", {"a", "b"}, found)
    with pytest.raises(SeamError, match="Params of vLLM has new fields"):
        features.check_lists("Params", {"mapped": "a b"}, tuple(found))


def test_a_field_on_two_lists_fails_loudly() -> None:
    with pytest.raises(SeamError):
        features.check_lists("Params", {"mapped": "a", "refused": "a"}, ("a",))
