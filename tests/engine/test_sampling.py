"""Sampling options over steps of several tokens, against the reference and against serial."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.engine.cases import CHECKPOINTS, golden_records
from tests.engine.checkpoints import with_byte_tokenizer
from tests.engine.compare import LOGPROB_TOLERANCE, assert_same, reference_run, same
from tests.engine.harness import Output, engine, generate, generate_one, greedy
from tests.reference.model import Reference

TOKENS = 24
DEPTH = {
    "early": {"forced_depths": [1]},
    "ragged": {"forced_depths": [1, 3, 1, 2, 4, 1, 1]},
    "gate": {"exit_threshold": 0.3, "exit_mode": "skip"},
    "exact": {"exit_threshold": 0.5, "exit_mode": "exact"},
    "full": {"exit_threshold": 1.0},
}
PROMPTS = [record["prompt"] for record in golden_records("t4-mha")[:4]]
TEXT = list(b"how now, brown cow")
LETTERS = [ord(c) for c in "abcdefgh"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("sampling") / "model"
    model = with_byte_tokenizer(CHECKPOINTS["t4-mha"], folder)
    with engine(model, skip_tokenizer_init=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(CHECKPOINTS["t4-mha"])


@pytest.fixture(params=DEPTH)
def depth(request: pytest.FixtureRequest) -> dict[str, Any]:
    return DEPTH[request.param]


expect = partial(reference_run, max_tokens=TOKENS)


@pytest.mark.parametrize(
    ("presence", "frequency", "repetition"),
    [(1.5, 0, 1), (0, 0.8, 1), (0, 0, 1.6), (0.5, 0.5, 1.2)],
)
def test_penalties_see_the_tokens_of_the_same_step(
    llm: LLM,
    reference: Reference,
    depth: dict[str, Any],
    presence: float,
    frequency: float,
    repetition: float,
) -> None:
    for prompt in PROMPTS:

        def penalised(logits: torch.Tensor, output: list[int], prompt=prompt) -> int:
            logits = logits.clone()
            known = torch.tensor(sorted({*prompt, *output}))
            values = logits[known]
            logits[known] = torch.where(values > 0, values / repetition, values * repetition)
            for token, count in Counter(output).items():
                logits[token] -= frequency * count + presence
            return int(logits.argmax())

        options = {
            "presence_penalty": presence,
            "frequency_penalty": frequency,
            "repetition_penalty": repetition,
        }
        out = generate_one(llm, prompt, greedy(TOKENS, depth, **options))
        same(f"prompt of {len(prompt)}", out, expect(reference, prompt, depth, choose=penalised))


def test_min_tokens_hold_back_a_stop_inside_a_step(
    llm: LLM, reference: Reference, depth: dict[str, Any]
) -> None:
    free = expect(reference, PROMPTS[2], depth)
    stops = {free.tokens[1], free.tokens[2]}
    for least in (0, 1, 2, 3, 5, 6):

        def held(logits: torch.Tensor, output: list[int], least=least) -> int:
            logits = logits.clone()
            if len(output) < least:
                logits[list(stops)] = -torch.inf
            return int(logits.argmax())

        expected = expect(reference, PROMPTS[2], depth, choose=held, stop=frozenset(stops))
        params = greedy(TOKENS, depth, stop_token_ids=sorted(stops), min_tokens=least)
        out = generate_one(llm, PROMPTS[2], params)
        same(f"min_tokens {least}", out, expected)
        if out.finish_reason == "stop":
            assert out.tokens[-1] in stops
            assert len(out.tokens) > least


def test_stop_token_at_every_place(llm: LLM, reference: Reference, depth: dict[str, Any]) -> None:
    free = expect(reference, PROMPTS[3], depth)
    stops = list(dict.fromkeys(free.tokens))
    params = [greedy(TOKENS, depth, stop_token_ids=[stop]) for stop in stops]
    for stop, out in zip(stops, generate(llm, [PROMPTS[3]] * len(stops), params), strict=True):
        end = free.tokens.index(stop) + 1
        assert_same(f"stop {stop}", out.tokens, out.depths, free.tokens[:end], free.depths[:end])
        assert (out.finish_reason, out.stop_reason) == ("stop", stop)


def test_eos_in_the_middle_of_a_step(llm: LLM, reference: Reference, depth: dict[str, Any]) -> None:
    def biased(logits: torch.Tensor, output: list[int]) -> int:
        logits = logits.clone()
        logits[2] += 2.5
        return int(logits.argmax())

    lengths = []
    for prompt in PROMPTS:
        expected = expect(reference, prompt, depth, choose=biased, stop=frozenset({2}))
        params = greedy(TOKENS, depth, logit_bias={2: 2.5}, ignore_eos=False)
        same(f"prompt of {len(prompt)}", generate_one(llm, prompt, params), expected)
        lengths.append(len(expected.tokens))
    assert min(lengths) < TOKENS, "no EOS was met"


def test_max_tokens_at_every_place(llm: LLM, reference: Reference, depth: dict[str, Any]) -> None:
    free = expect(reference, PROMPTS[2], depth)
    outputs = generate(llm, [PROMPTS[2]] * 10, [greedy(limit, depth) for limit in range(1, 11)])
    for limit, out in enumerate(outputs, 1):
        both = (free.tokens[:limit], free.depths[:limit])
        assert_same(f"max_tokens {limit}", out.tokens, out.depths, *both)
        assert out.finish_reason == "length"


def test_the_context_length_ends_a_request(llm: LLM, depth: dict[str, Any]) -> None:
    limit = llm.llm_engine.vllm_config.model_config.max_model_len
    for spare in (1, 2, 3, 5):
        out = generate_one(llm, [9] * (limit - spare), greedy(TOKENS, depth))
        assert len(out.tokens) == spare
        assert out.finish_reason == "length"


def test_stop_string_across_tokens_of_one_step(
    llm: LLM, reference: Reference, depth: dict[str, Any]
) -> None:
    def spell(logits: torch.Tensor, output: list[int]) -> int:
        return LETTERS[int(logits[LETTERS].argmax())]

    free = expect(reference, TEXT, depth, choose=spell)
    text = bytes(free.tokens).decode()
    for start in (1, 2, 5, 9):
        stop = text[start : start + 2]
        end = text.index(stop) + 2
        params = greedy(TOKENS, depth, allowed_token_ids=LETTERS, stop=[stop], detokenize=True)
        out = generate_one(llm, TEXT, params)
        assert_same(f"stop {stop!r}", out.tokens, out.depths, free.tokens[:end], free.depths[:end])
        assert out.text == text[: end - 2]
        assert (out.finish_reason, out.stop_reason) == ("stop", stop)


def test_bad_words_see_the_tokens_of_the_same_step(
    llm: LLM, reference: Reference, depth: dict[str, Any]
) -> None:
    def spell(logits: torch.Tensor, output: list[int]) -> int:
        return LETTERS[int(logits[LETTERS].argmax())]

    text = bytes(expect(reference, TEXT, depth, choose=spell).tokens).decode()
    words = [text[2:4], text[6:8]]

    def careful(logits: torch.Tensor, output: list[int]) -> int:
        allowed = [t for t in LETTERS if chr(output[-1] if output else 0) + chr(t) not in words]
        return allowed[int(logits[allowed].argmax())]

    params = greedy(TOKENS, depth, allowed_token_ids=LETTERS, bad_words=words)
    out = generate_one(llm, TEXT, params)
    same(f"bad words {words}", out, expect(reference, TEXT, depth, choose=careful))


def test_top_logprobs_are_those_of_the_exit_loop(
    llm: LLM, reference: Reference, depth: dict[str, Any]
) -> None:
    seen: list[torch.Tensor] = []

    def noting(logits: torch.Tensor, output: list[int]) -> int:
        seen.append(logits.log_softmax(-1))
        return int(logits.argmax())

    expected = expect(reference, PROMPTS[2], depth, choose=noting)
    request = {"prompt_token_ids": PROMPTS[2]}
    answer = llm.generate(request, greedy(TOKENS, depth, logprobs=5), use_tqdm=False)[0].outputs[0]
    assert list(answer.token_ids) == expected.tokens
    assert answer.logprobs is not None
    for index, (entry, logprobs) in enumerate(zip(answer.logprobs, seen, strict=True)):
        assert len(entry) == 5
        assert sorted(v.rank for v in entry.values()) == [1, 2, 3, 4, 5]
        for token, value in entry.items():
            off = abs(value.logprob - float(logprobs[token]))
            assert off <= LOGPROB_TOLERANCE, f"token {index}, alternative {token}: off by {off}"


SAMPLERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 9},
    "min_p": {"min_p": 0.1},
    "penalised": {"presence_penalty": 0.9, "repetition_penalty": 1.2},
}


def sampled(
    depth: dict[str, Any], seed: int, max_tokens: int = TOKENS, **options: Any
) -> SamplingParams:
    return greedy(max_tokens, depth, temperature=1.0, seed=seed, **options)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_gives_the_same_tokens_in_any_company(llm: LLM, sampler: str) -> None:
    options = SAMPLERS[sampler]
    rng = random.Random(sampler)
    requests = [
        (rng.choice(PROMPTS), sampled(rng.choice(list(DEPTH.values())), 40 + number, **options))
        for number in range(6)
    ]
    alone = [generate_one(llm, prompt, params) for prompt, params in requests]
    assert len({tuple(out.tokens) for out in alone}) == len(alone)
    strangers = [
        (rng.choice(PROMPTS), greedy(rng.randint(1, 20), d, temperature=rng.choice([0.0, 1.3])))
        for d in DEPTH.values()
    ]
    for company in (requests, [*strangers, *requests]):
        outputs = generate(llm, [p for p, _ in company], [params for _, params in company])
        by_seed = {
            params.seed: out
            for (_, params), out in zip(company, outputs, strict=True)
            if params.seed is not None
        }
        for (_, params), expected in zip(requests, alone, strict=True):
            out = by_seed[params.seed]
            what = f"seed {params.seed} among {len(company)}"
            assert_same(what, out.tokens, out.depths, expected.tokens, expected.depths)


def test_the_sampled_distribution_does_not_depend_on_tokens_per_step(llm: LLM) -> None:
    """A seeded request draws one number per token, however many tokens a step yields."""
    prompt, limit = PROMPTS[3], 12
    full = generate_one(llm, prompt, sampled({"forced_depths": [4]}, 3, max_tokens=limit))
    bound = generate_one(
        llm, prompt, sampled({"forced_depths": [4], "exit_mode": "exact"}, 3, max_tokens=limit)
    )
    assert_same("exact at depth T", bound.tokens, bound.depths, full.tokens, full.depths)


def test_n_gives_the_answers_of_n_requests(llm: LLM, depth: dict[str, Any]) -> None:
    request = {"prompt_token_ids": PROMPTS[2]}
    answer = llm.generate(request, sampled(depth, 70, n=3), use_tqdm=False)[0]
    assert [completion.index for completion in answer.outputs] == [0, 1, 2]
    for index, completion in enumerate(answer.outputs):
        out = Output.of(completion)
        alone = generate_one(llm, PROMPTS[2], sampled(depth, 70 + index))
        assert_same(f"choice {index}", out.tokens, out.depths, alone.tokens, alone.depths)


def test_text_is_that_of_the_tokens(llm: LLM, depth: dict[str, Any]) -> None:
    params = greedy(TOKENS, depth, allowed_token_ids=LETTERS, detokenize=True)
    out = generate_one(llm, TEXT, params)
    assert out.text == bytes(out.tokens).decode()
