"""`return_loops`: what each loop would have said of every token."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.outputs import CompletionOutput

from ouro_runtime.config import DepthError
from tests.engine.cases import CHECKPOINTS, golden_records
from tests.engine.compare import LOGPROB_TOLERANCE
from tests.engine.harness import assert_idle, count_preemptions, engine, greedy
from tests.reference.model import Reference

LOOPS = {"t4-mha": 4, "t6-gqa": 6}
MOST = 5
FULL: dict[str, Any] = {"exit_threshold": 1.0}
GUIDED = {"exit_mode": "lossless"}
MODES: list[dict[str, Any]] = [
    FULL,
    *({"exit_threshold": q, "exit_mode": mode} for q in (0.2, 0.5) for mode in ("skip", "exact")),
    {"forced_depths": [1, 3, 2, 1, 4], "exit_mode": "skip"},
    GUIDED,
    {"exit_mode": "lossless", "exit_threshold": 0.2},
    {"exit_mode": "lossless", "forced_depths": [1, 2]},
]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(checkpoint: str) -> Iterator[LLM]:
    with engine(CHECKPOINTS[checkpoint]) as made:
        yield made


def ask(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[dict[str, Any]],
    max_tokens: int = 12,
    **options: Any,
) -> list[CompletionOutput]:
    """A batch of greedy requests whose `extra_args` are `asked`."""
    params = [greedy(max_tokens, extra, **options) for extra in asked]
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs = [answer.outputs[0] for answer in llm.generate(inputs, params, use_tqdm=False)]
    assert_idle(llm)
    return outputs


def assert_are(guesses: list[dict[str, Any]], logits: torch.Tensor, most: int) -> None:
    """The likeliest tokens of `logits` [vocab], with their log-probabilities, likeliest first."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(most)
    assert len({guess["token_id"] for guess in guesses}) == len(guesses) == most
    for guess, value in zip(guesses, best.values.tolist(), strict=True):
        assert abs(guess["logprob"] - value) <= LOGPROB_TOLERANCE
        assert abs(guess["logprob"] - float(logprobs[guess["token_id"]])) <= LOGPROB_TOLERANCE


def test_the_first_tokens_loops_are_those_of_the_released_code(checkpoint: str, llm: LLM) -> None:
    records = golden_records(checkpoint)
    prompts = [record["prompt"] for record in records]
    for output, record in zip(
        ask(llm, prompts, [FULL | {"return_loops": 20}] * len(prompts)), records, strict=True
    ):
        by_loop = record["last_position"]["logits_by_loop"]
        assert len(output.loops[0]) == len(by_loop) == LOOPS[checkpoint]
        for guesses, logits in zip(output.loops[0], by_loop, strict=True):
            assert_are(guesses, torch.tensor(logits), 20)


def test_every_tokens_loops_are_those_of_the_reference(checkpoint: str, llm: LLM) -> None:
    reference = Reference(CHECKPOINTS[checkpoint])
    prompts = [record["prompt"] for record in golden_records(checkpoint)]
    for extra in (FULL, {"exit_mode": "lossless", "exit_threshold": 0.2}):
        asked = [extra | {"return_loops": MOST}] * len(prompts)
        for prompt, output in zip(prompts, ask(llm, prompts, asked), strict=True):
            states = reference.prompt_states([*prompt, *output.token_ids])[1]
            for place, token in enumerate(output.loops):
                assert len(token) == LOOPS[checkpoint]
                for loop, guesses in enumerate(token):
                    assert_are(guesses, states[loop, len(prompt) - 1 + place], MOST)


def test_in_any_mode_the_loop_of_the_read_out_says_the_token_and_nothing_else_changes(
    checkpoint: str, llm: LLM
) -> None:
    """Beside requests that do not ask, and are told nothing."""
    prompts = [record["prompt"] for record in golden_records(checkpoint)][: len(MODES)]
    prompts = [prompts[place % len(prompts)] for place in range(len(MODES))]
    plain = ask(llm, prompts, MODES)
    asked = [extra | {"return_loops": 1 + place} for place, extra in enumerate(MODES)]
    outputs = ask(llm, [*prompts, *prompts], [*asked, *MODES])
    for place, (before, output) in enumerate(zip([*plain, *plain], outputs, strict=True)):
        assert output.token_ids == before.token_ids
        # Where drafts are made by what the server has learnt, no two runs need agree.
        if MODES[place % len(MODES)] != GUIDED:
            assert output.depths == before.depths
        if place >= len(MODES):
            assert output.loops == []
            continue
        lossless = MODES[place].get("exit_mode") == "lossless"
        ran = [LOOPS[checkpoint]] * len(output.depths) if lossless else output.depths
        assert [len(token) for token in output.loops] == ran
        assert {len(loop) for token in output.loops for loop in token} == {1 + place}
        assert output.logprobs is not None
        for token, said, logprob in zip(
            output.token_ids, output.loops, output.logprobs, strict=True
        ):
            last = said[-1][0]
            assert (last["token_id"], last["token"]) == (token, None)
            assert last["logprob"] == pytest.approx(logprob[token].logprob, abs=LOGPROB_TOLERANCE)


def test_sampling_changes_the_token_and_not_what_is_said(checkpoint: str, llm: LLM) -> None:
    prompt = [golden_records(checkpoint)[1]["prompt"]]
    extra = [FULL | {"return_loops": MOST}]
    (calm,) = ask(llm, prompt, extra, max_tokens=1)
    (wild,) = ask(llm, prompt, extra, max_tokens=1, temperature=2.0, seed=3, logit_bias={5: 100.0})
    assert list(wild.token_ids) == [5]
    assert wild.loops == calm.loops


@pytest.mark.parametrize("value", [0, 21, True, 2.0, "3", [1]])
def test_a_number_out_of_range_is_refused_by_name(llm: LLM, value: object) -> None:
    with pytest.raises(DepthError, match="return_loops must be an integer from 1 to 20") as error:
        ask(llm, [[1]], [{"return_loops": value}])
    assert error.value.param == "return_loops"


def test_preempted_requests_say_the_same() -> None:
    rng = random.Random(5)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(5, 40))] for _ in range(10)]
    asked = [MODES[place % len(MODES)] | {"return_loops": MOST} for place in range(10)]
    options = {"max_model_len": 128, "max_num_batched_tokens": 96, "max_num_seqs": 8}
    said = []
    for blocks in (511, 8):
        with engine(CHECKPOINTS["t4-mha"], blocks=blocks, **options) as made:
            preempted = count_preemptions(made)
            said.append(ask(made, prompts, asked, max_tokens=50))
            assert bool(preempted) == (blocks == 8)
    for undisturbed, output in zip(*said, strict=True):
        assert output.token_ids == undisturbed.token_ids
        for left, right in zip(output.loops, undisturbed.loops, strict=True):
            assert len(left) == len(right)
            for one, other in zip(left, right, strict=True):
                for a, b in zip(one, other, strict=True):
                    assert a["logprob"] == pytest.approx(b["logprob"], abs=LOGPROB_TOLERANCE)
