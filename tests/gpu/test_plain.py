"""Which requests the read-out piece serves: where vLLM's sampler would do nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ouro_runtime.engine.cuda import sampler as lane_sampler
from ouro_runtime.engine.cuda.lanes import LaneBuffers
from ouro_runtime.engine.cuda.sampler import is_plain

SLOTS, VOCAB = 6, 100
HERE = np.array([4, 1])


def sampler() -> Any:
    """As vLLM's is where slot 1 is drawn at a temperature and slot 2 asks for everything."""
    no = np.zeros(SLOTS, bool)

    def column(value: float) -> Any:
        return SimpleNamespace(np=np.full(SLOTS, value))

    made = SimpleNamespace(
        trace_replay_state=None,
        return_sampling_mask=False,
        needs_logits_processing=no.copy(),
        sampling_states=SimpleNamespace(
            min_p=column(0.0), top_k=column(VOCAB), top_p=column(1.0), vocab_size=VOCAB
        ),
        thinking_budget_state=SimpleNamespace(enabled=True, use_thinking_budget=no.copy()),
        logits_processors=[
            SimpleNamespace(use_logit_bias=no.copy()),
            SimpleNamespace(use_penalty=no.copy()),
            SimpleNamespace(num_bad_words=column(0)),
        ],
    )
    made.needs_logits_processing[[1, 2]] = True
    for name in ASKS:
        ASKS[name](made, 2)
    return made


def ask(*path: str | int, value: Any = True) -> Any:
    def do(made: Any, slot: int) -> None:
        for name in path:
            made = made[name] if isinstance(name, int) else getattr(made, name)
        made[slot] = value

    return do


ASKS: dict[str, Any] = {
    "min_p": ask("sampling_states", "min_p", "np", value=0.1),
    "top_k": ask("sampling_states", "top_k", "np", value=7),
    "top_p": ask("sampling_states", "top_p", "np", value=0.9),
    "budget": ask("thinking_budget_state", "use_thinking_budget"),
    "bias": ask("logits_processors", 0, "use_logit_bias"),
    "penalties": ask("logits_processors", 1, "use_penalty"),
    "bad words": ask("logits_processors", 2, "num_bad_words", "np", value=1),
}


def test_greedy_and_tempered_requests_are_plain_whatever_a_neighbour_asks_for() -> None:
    assert is_plain(sampler(), HERE)
    assert not is_plain(sampler(), np.array([4, 2]))


@pytest.mark.parametrize("name", ASKS)
def test_a_request_that_asks_for_more_is_not(name: str) -> None:
    made = sampler()
    ASKS[name](made, 1)
    assert not is_plain(made, HERE)


def test_what_concerns_the_whole_sampler() -> None:
    made = sampler()
    made.logits_processors.append(SimpleNamespace())
    assert not is_plain(made, HERE)
    for field, value in (("trace_replay_state", object()), ("return_sampling_mask", True)):
        made = sampler()
        setattr(made, field, value)
        assert not is_plain(made, HERE)


def test_what_only_a_draw_would_heed_is_nothing_to_a_greedy_request() -> None:
    """vLLM keeps its top-k, and does not count it among those that need processing."""
    made = sampler()
    ASKS["top_k"](made, 4)
    assert is_plain(made, HERE)


def test_a_users_processor_that_nobody_asks_for() -> None:
    made = sampler()
    made.logits_processors.append(SimpleNamespace())
    assert is_plain(made, np.array([4]))


def test_without_a_reasoning_parser_there_are_no_budgets_to_ask_for() -> None:
    made = sampler()
    made.thinking_budget_state = SimpleNamespace(enabled=False)
    assert is_plain(made, HERE)


@pytest.mark.parametrize("double", [False, True])
def test_a_plain_draw_has_the_precision_that_the_sampler_has(
    double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def draw(logits: torch.Tensor, *args: Any, use_fp64: bool, **options: Any) -> torch.Tensor:
        asked.append(use_fp64)
        return logits.argmax(-1)

    monkeypatch.setattr(lane_sampler, "gumbel_sample", draw)
    buffers = LaneBuffers(2, 2, 2, 4, 3, torch.float32, "cpu")
    made: Any = SimpleNamespace(use_fp64_gumbel=double)
    assert lane_sampler.sample_plain(made, buffers, torch.eye(5)[[3, 1]]).tolist() == [3, 1]
    assert asked == [double]
