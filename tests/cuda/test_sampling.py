"""vLLM's sampler between the passes of a step: every option sees the step's earlier tokens, and no
request sees its neighbours."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from vllm.sampling_params import StructuredOutputsParams

from tests.cuda import bench
from tests.engine.cases import CHECKPOINTS
from tests.engine.compare import LOGPROB_TOLERANCE, assert_same, reference_run, same
from tests.engine.harness import Arrival, drive, generate, generate_one, greedy
from tests.engine.mixes import (
    SCHEMA,
    assert_same_values,
    gate_fields,
    random_request,
    sampling,
    tokens,
)
from tests.reference.model import Reference

TOKENS = 12
TEXT = list(b"how now")
LETTERS = [ord(c) for c in "abcdefgh"]
RAGGED = {"forced_depths": [1, 3, 1, 2, 4, 1, 1]}
GATE = {"exit_threshold": 0.3}
pytestmark = bench.on("t4")


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(CHECKPOINTS["t4-mha"])


expect = partial(reference_run, max_tokens=TOKENS)


def test_penalties_and_bad_words_see_the_tokens_of_the_same_step(
    llm: Any, reference: Reference
) -> None:
    def penalised(logits: torch.Tensor, output: list[int]) -> int:
        logits = logits.clone()
        known = torch.tensor(sorted({*TEXT, *output}))
        logits[known] = torch.where(logits[known] > 0, logits[known] / 1.2, logits[known] * 1.2)
        for token, count in Counter(output).items():
            logits[token] -= 0.5 * count + 0.5
        return int(logits.argmax())

    def spelt(logits: torch.Tensor, output: list[int]) -> int:
        return LETTERS[int(logits[LETTERS].argmax())]

    text = bytes(expect(reference, TEXT, RAGGED, choose=spelt).tokens).decode()
    words = [text[2:4], text[6:8]]

    def careful(logits: torch.Tensor, output: list[int]) -> int:
        allowed = [t for t in LETTERS if chr(output[-1] if output else 0) + chr(t) not in words]
        return allowed[int(logits[allowed].argmax())]

    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    forbidden = {"allowed_token_ids": LETTERS, "bad_words": words}
    requests = [
        (depth, options, choose)
        for depth in (RAGGED, GATE)
        for options, choose in ((penalties, penalised), (forbidden, careful))
    ]
    params = [greedy(TOKENS, depth, **options) for depth, options, _ in requests]
    outputs = generate(llm, [TEXT] * len(requests), params)
    for (depth, options, choose), out in zip(requests, outputs, strict=True):
        same(f"{depth} {options}", out, expect(reference, TEXT, depth, choose=choose))
    bench.assert_idle(llm)


def test_log_probabilities_are_those_of_the_loop_that_read_out(
    llm: Any, reference: Reference
) -> None:
    seen: list[torch.Tensor] = []

    def noting(logits: torch.Tensor, output: list[int]) -> int:
        seen.append(logits.log_softmax(-1))
        return int(logits.argmax())

    expected = expect(reference, TEXT, RAGGED, choose=noting)
    (out,) = generate(llm, [TEXT], greedy(TOKENS, RAGGED, logprobs=3))
    assert out.tokens == expected.tokens
    for index, (entries, logprobs) in enumerate(zip(out.entries, seen, strict=True)):
        assert set(entries) == set(logprobs.topk(3).indices.tolist()), f"token {index}"
        for token, value in entries.items():
            assert value == pytest.approx(float(logprobs[token]), abs=LOGPROB_TOLERANCE)


def test_log_probabilities_of_a_prompt_are_those_of_the_last_loop(
    llm: Any, reference: Reference
) -> None:
    prompt = tokens(random.Random(2), 9)
    outputs = drive(llm, [Arrival("a", prompt, greedy(3, RAGGED, prompt_logprobs=2))])
    logprobs = reference.prompt_states(prompt)[1][-1].log_softmax(-1)
    entries = outputs["a", 0].prompt_entries
    assert len(entries) == len(prompt)
    for position, entry in enumerate(entries[1:], 1):
        assert prompt[position] in entry
        for token, value in entry.items():
            want = float(logprobs[position - 1, token])
            assert value == pytest.approx(want, abs=LOGPROB_TOLERANCE), position


def test_n_gives_the_answers_of_n_seeds_and_a_seed_needs_no_company(llm: Any) -> None:
    def sampled(depth: dict[str, Any], seed: int, **options: Any) -> Any:
        return greedy(8, depth, temperature=1.0, seed=seed, logprobs=None, **options)

    kinds = [(GATE, {}), (RAGGED, {"top_k": 9}), ({"exit_threshold": 1.0}, {"top_p": 0.7})]
    params = [sampled(depth, 40 + i, **options) for i, (depth, options) in enumerate(kinds)]
    together = drive(
        llm,
        [
            *(Arrival(f"seed {i}", TEXT, p) for i, p in enumerate(params)),
            Arrival("n", TEXT, sampled(GATE, 70, n=2)),
            Arrival("stranger", TEXT[:3], greedy(9, GATE, temperature=1.3), step=1),
        ],
    )
    alone = {("n", index): sampled(GATE, 70 + index) for index in range(2)}
    alone |= {(f"seed {i}", 0): p for i, p in enumerate(params)}
    for who, p in alone.items():
        out, expected = together[who], generate_one(llm, TEXT, p)
        assert_same(str(who), out.tokens, out.depths, expected.tokens, expected.depths)
    assert len({tuple(together[who].tokens) for who in alone}) == len(alone)
    bench.assert_idle(llm)


def test_a_grammar_holds_and_leaves_its_neighbours_alone(llm: Any) -> None:
    grammar = {
        "structured_outputs": StructuredOutputsParams(json=SCHEMA),
        "detokenize": True,
        "ignore_eos": False,
        "logit_bias": dict.fromkeys(b" \t\r\n", -100.0),
    }
    params = [greedy(40, GATE, **grammar), greedy(TOKENS, GATE), greedy(TOKENS, RAGGED)]
    bound, *free = generate(llm, [TEXT] * 3, params)
    assert set(json.loads(bound.text)) == {"n", "ok"}
    for out, options in zip(free, params[1:], strict=True):
        alone = generate_one(llm, TEXT, options)
        assert_same("beside", out.tokens, out.depths, alone.tokens, alone.depths)
    bench.assert_idle(llm)


def crowd(llm: Any, count: int, seed: int) -> None:
    """Random requests that ask for anything, alone and together."""
    rng = random.Random(seed)
    prefix = tokens(rng, 20)
    requests = [random_request(rng, prefix, gate_fields) for _ in range(count)]
    requests = [(prompt[:40], options) for prompt, options in requests]
    alone = [
        drive(llm, [Arrival("alone", prompt, sampling(options))]) for prompt, options in requests
    ]
    arrivals = [
        Arrival(str(index), prompt, sampling(options), step=rng.randint(0, 3))
        for index, (prompt, options) in enumerate(requests)
    ]
    together = drive(llm, arrivals)
    for index, (_, options) in enumerate(requests):
        for copy in range(options.get("n", 1)):
            out, expected = together[str(index), copy], alone[index]["alone", copy]
            both = (out.tokens, out.depths, expected.tokens, expected.depths)
            assert_same(f"request {index}: {options}", *both)
            assert_same_values(f"request {index}: {options}", out, expected)
    bench.assert_idle(llm)


def test_whatever_a_crowd_asks_for_each_gets_what_it_gets_alone(llm: Any) -> None:
    crowd(llm, 6, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
def test_larger_crowds(llm: Any, seed: int) -> None:
    crowd(llm, 14, seed)
