"""Log-probabilities of the prompt."""

import pytest

from tests.engine.cases import CHECKPOINTS, golden_records
from tests.engine.compare import LOGPROB_TOLERANCE
from tests.engine.harness import engine, greedy
from tests.reference.model import Reference


@pytest.mark.parametrize("budget", [256, 32])
def test_prompt_logprobs_are_those_of_the_last_loop(budget: int) -> None:
    reference = Reference(CHECKPOINTS["t4-mha"])
    prompts = [record["prompt"] for record in golden_records("t4-mha")]
    depth = {"forced_depths": [1, 3, 1, 2, 4, 1, 1]}
    options = {"max_num_batched_tokens": budget, "max_num_seqs": 8}
    with engine(CHECKPOINTS["t4-mha"], **options) as llm:
        answers = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            greedy(6, depth, prompt_logprobs=2),
            use_tqdm=False,
        )
    for prompt, answer in zip(prompts, answers, strict=True):
        logprobs = reference.prompt_states(prompt)[1][-1].log_softmax(-1)
        assert answer.prompt_logprobs is not None
        assert len(answer.prompt_logprobs) == len(prompt)
        for position, entry in enumerate(answer.prompt_logprobs[1:], 1):
            assert entry is not None
            assert prompt[position] in entry
            for token, value in entry.items():
                off = abs(value.logprob - float(logprobs[position - 1, token]))
                assert off <= LOGPROB_TOLERANCE, f"prompt position {position}: off by {off}"
