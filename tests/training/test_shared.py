"""Answers in parallel as mode `shared` serves them: against decoding position by position."""

import random

import pytest
import torch
from tokenizers import Tokenizer

from ouro_runtime.training.data import Batch, ChatSource, Chunk, Curriculum, pack
from ouro_runtime.training.model import LoopLM, LoopLMConfig
from ouro_runtime.training.reference import Controls, Reference, exit_depths
from ouro_runtime.training.shared import generated, served

ANSWER = 9
"""Tokens of each answer; all but the first are made by generated positions."""


@pytest.fixture(scope="module")
def model() -> LoopLM:
    torch.manual_seed(1)
    model = LoopLM(LoopLMConfig(50, 64, 96, 2, 2))
    torch.nn.init.normal_(model.lm_head.weight)
    torch.nn.init.normal_(model.model.early_exit_gate.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(5, 50) for _ in range(n)] for n in (1, 4, 9, 6)]


def packed(prompts: list[list[int]], answers: list[list[int]]) -> Batch:
    """Three conversations in the first row, one in the second; none starts where another does."""
    chunks = [
        Chunk(p + a, [("sum", 0, len(p), len(p) + len(a))])
        for p, a in zip(prompts, answers, strict=True)
    ]
    return pack([chunks[:3], chunks[3:]], 48)


@torch.no_grad()
def in_parallel(model: LoopLM, batch: Batch, threshold: float, rounds: int) -> torch.Tensor:
    """States [loops, M, D] of the generated positions."""
    places = batch.pick[generated(batch).pick]
    leaves = torch.ones(batch.ids.numel())
    leaves[places] = threshold
    return served(model, batch, leaves.view_as(batch.ids), rounds)[0][:, len(batch.pick) :]


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 1.0])
def test_rounds_end_at_what_mode_shared_serves(
    model: LoopLM, prompts: list[list[int]], threshold: float
) -> None:
    """Tokens and depths, packed beside other conversations at other positions."""
    controls = Controls(threshold, exit_mode="shared")
    tokens, depths = Reference(model).generate(prompts, controls, ANSWER, stop=())
    assert threshold == 1 or len({d for row in depths for d in row}) > 1, "nothing is tested"
    states = in_parallel(model, packed(prompts, tokens), threshold, ANSWER)
    exits = exit_depths(torch.sigmoid(model.gate(states)), controls)
    made = model.lm_head(states[exits - 1, torch.arange(len(exits))]).argmax(-1)
    assert exits.tolist() == [d for row in depths for d in row[1:]]
    assert made.tolist() == [t for row in tokens for t in row[1:]]


def test_each_round_makes_one_more_position_exact(model: LoopLM, prompts: list[list[int]]) -> None:
    answers = [[7 + i for i in range(ANSWER)] for _ in prompts]
    batch = packed(prompts, answers)
    exact = in_parallel(model, batch, 0.5, ANSWER)
    for rounds in (1, 2, 4):
        near = in_parallel(model, batch, 0.5, rounds)
        wrong = (near - exact).abs().amax((0, 2)).view(len(prompts), ANSWER - 1) > 1e-4
        assert not wrong[:, :rounds].any()
        assert wrong[:, rounds:].any(), "a round less would do"


def test_targets_of_generated_tokens_follow_those_of_all(model: LoopLM, tok: Tokenizer) -> None:
    """An answer's first token is predicted by its prompt, which no mode changes."""
    batch = ChatSource(tok, Curriculum()).batch(random.Random(4), 4, 128)
    big = LoopLM(LoopLMConfig(tok.get_vocab_size(), 64, 96, 1, 2))
    with torch.no_grad():
        states, target = served(big, batch, None, 1)
    count = len(batch.pick)
    later = [i for _, _, start, end in batch.spans for i in range(start + 1, end)]
    assert states.shape[1] == len(target) == count + len(later)
    assert torch.equal(target[:count], batch.target)
    assert torch.equal(target[count:], batch.target[later])
    with torch.no_grad():
        plain = big(batch.ids, batch.bias, batch.pick)
    torch.testing.assert_close(states[:, :count], plain)
