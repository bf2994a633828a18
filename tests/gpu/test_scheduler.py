"""The asynchronous scheduler's counts."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from ouro_runtime.config import ExitParams
from ouro_runtime.engine.cuda.draft_choice import DraftChoice
from ouro_runtime.engine.cuda.scheduler import OuroAsyncScheduler, most_tokens


@pytest.mark.parametrize(
    ("depth", "most"),
    [
        (ExitParams(1.0, 1, 4, "skip"), 1),
        (ExitParams(0.5, 1, 4, "skip"), 4),
        (ExitParams(0.5, 2, 4, "skip"), 2),
        (ExitParams(0.5, 3, 4, "skip"), 2),
        (ExitParams(0.5, 4, 4, "skip"), 1),
        (ExitParams(1.0, 1, 2, "skip"), 2),
        (ExitParams(0.5, 1, 4, "exact"), 1),
        (ExitParams(0.5, 1, 4, "lossless"), 1),
        (ExitParams(1.0, 1, 4, "skip", (4, 2)), 2),
        (ExitParams(1.0, 1, 4, "skip", (1,)), 4),
    ],
)
def test_most_tokens_of_a_step(depth: ExitParams, most: int) -> None:
    assert most_tokens(depth, False, 4) == most
    assert most_tokens(depth, True, 4) == 1


def test_what_a_preempted_request_had_in_flight_is_not_expected_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its steps still come back, and bring nothing that counts."""
    scheduler = OuroAsyncScheduler.__new__(OuroAsyncScheduler)
    scheduler.max_model_len = 100
    request = SimpleNamespace(
        request_id="a",
        num_computed_tokens=9,
        num_tokens=10,
        num_prompt_tokens=4,
        max_tokens=50,
        is_prefill_chunk=False,
        num_output_placeholders=0,
    )
    scheduler.requests = {"a": request}
    scheduler._filled, scheduler._most, scheduler._flight = {}, {"a": 4}, {"a": deque([4, 3])}
    scheduler.drafts = DraftChoice(4, 0)
    monkeypatch.setattr(AsyncScheduler, "_update_after_schedule", lambda *_: None)

    def schedule(new: list[Any]) -> None:
        output = SimpleNamespace(scheduled_new_reqs=new, num_scheduled_tokens={"a": 1})
        scheduler._update_after_schedule(output)
        assert output.ouro_brings == {"a"}

    # Back with 10 tokens, which one chunk fills in: that step brings one.
    schedule([SimpleNamespace(req_id="a", prefill_token_ids=list(range(10)))])
    assert (request.num_output_placeholders, request.num_computed_tokens) == (1, 10)
    assert list(scheduler._flight["a"]) == [0, 0, 1]
    # A decode step after it may bring four more.
    request.num_computed_tokens = 10
    schedule([])
    assert (request.num_output_placeholders, request.num_computed_tokens) == (5, 14)
