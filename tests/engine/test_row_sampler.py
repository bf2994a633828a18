"""Who may skip vLLM's sampler: only a batch that asks for nothing but the likeliest token."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata

from ouro_runtime.engine.row_sampler import is_bare_greedy

NONE = torch.empty(0)
BARE = SamplingMetadata(
    temperature=None,
    all_greedy=True,
    all_random=False,
    top_p=None,
    top_k=None,
    generators={},
    max_num_logprobs=None,
    no_penalties=True,
    prompt_token_ids=None,
    frequency_penalties=NONE,
    presence_penalties=NONE,
    repetition_penalties=NONE,
    output_token_ids=[[]],
    allowed_token_ids_mask=None,
    bad_words_token_ids={},
    logitsprocs=LogitsProcessors([]),
)
PROCESSOR: Any = SimpleNamespace(is_argmax_invariant=lambda: False)


def test_a_batch_that_asks_for_nothing_else() -> None:
    assert is_bare_greedy(BARE)


@pytest.mark.parametrize(
    "asked",
    [
        {"all_greedy": False},
        {"max_num_logprobs": 0},
        {"logprob_token_ids": {0: [3]}},
        {"no_penalties": False},
        {"bad_words_token_ids": {0: [[3]]}},
        {"allowed_token_ids_mask": torch.zeros(1, 8, dtype=torch.bool)},
        {"logitsprocs": LogitsProcessors([PROCESSOR])},
        {"thinking_budget_state_holder": SimpleNamespace(has_tracked_requests=lambda: True)},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_one_that_asks_for_more(asked: dict[str, Any]) -> None:
    assert not is_bare_greedy(replace(BARE, **asked))
