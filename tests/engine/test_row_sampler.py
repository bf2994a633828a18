"""Who may skip vLLM's sampler: only a batch that asks for nothing but the likeliest token."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata

from ouro_runtime.engine.cpu.sampler import SettledSampler, StepSampler, is_bare_greedy

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


def test_a_steps_tokens_in_the_order_of_its_passes() -> None:
    """Two passes of a bare greedy batch of three: one request yields twice, one nothing."""
    held: list[list[int]] = [[7], [], []]
    sampler = StepSampler(sampler=None, metadata=BARE, outputs=held)  # type: ignore[arg-type]
    logits = torch.eye(8)
    assert sampler.sample(np.array([2, 0]), logits[[3, 5]]).tolist() == [3, 5]
    assert sampler.sample(np.array([0]), logits[[1]]).tolist() == [1]
    tokens, logprobs = sampler.finish()
    assert tokens.tolist() == [[5, 1], [-1, -1], [3, -1]] and tokens.dtype == torch.int32
    assert logprobs is None
    assert held == [[7], [], []], "vLLM's bookkeeping adds the tokens"


def test_a_step_that_samples_nothing() -> None:
    tokens, _ = StepSampler(None, BARE, [[], []]).finish()  # type: ignore[arg-type]
    assert tokens.tolist() == [[-1, -1]] * 2


def test_penalties_see_the_steps_tokens_until_it_ends() -> None:
    """vLLM's bookkeeping adds them after the step, so the sampler takes its own off again."""
    held: list[list[int]] = [[7], []]
    seen = []

    def likeliest(logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> Any:
        seen.append([list(tokens) for tokens in held])
        ids = logits.argmax(-1, keepdim=True)
        return SimpleNamespace(sampled_token_ids=ids, logprobs_tensors=None)

    asked = replace(BARE, no_penalties=False, output_token_ids=held)
    sampler = StepSampler(likeliest, asked, held)  # type: ignore[arg-type]
    both = np.arange(2)
    sampler.sample(both, torch.eye(8)[[3, 5]])
    sampler.sample(both, torch.eye(8)[[1, 2]])
    tokens, _ = sampler.finish()
    assert seen == [[[7], []], [[7, 3], [5]]]
    assert tokens.tolist() == [[3, 1], [5, 2]]
    assert held == [[7], []]


def test_likeliest_tokens_do_not_depend_on_how_many_a_neighbour_asks_for() -> None:
    """Tokens that were never trained have equal logits; a grammar may leave nothing else."""
    logits = torch.zeros(2, 64)
    logits[:, ::3] = -torch.inf
    few, many = (
        SettledSampler()(logits.clone(), replace(BARE, max_num_logprobs=count)).logprobs_tensors
        for count in (2, 20)
    )
    assert few is not None and many is not None
    assert few.logprob_token_ids.tolist() == [[1, 1, 2]] * 2
    assert torch.equal(few.logprob_token_ids, many.logprob_token_ids[:, :3])
    assert torch.equal(few.logprobs, many.logprobs[:, :3])
    assert torch.equal(few.selected_token_ranks, many.selected_token_ranks)
