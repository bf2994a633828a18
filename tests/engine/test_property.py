"""Batched equals serial in tokens, depths and log-probabilities, whatever requests ask for.

A pool of random requests is run one by one in a roomy engine. Then workloads of requests drawn from
the pool, with random arrivals and departures, run in engines of four kinds; whatever shares the
batch, each request must come out as it did alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from vllm import SamplingParams

from ouro_runtime.config import LOSSLESS
from ouro_runtime.engine import features
from tests.engine.checkpoints import with_byte_tokenizer, write_random
from tests.engine.compare import assert_same
from tests.engine.harness import (
    Arrival,
    Output,
    assert_idle,
    count_preemptions,
    drive,
    engine,
    generate,
    generate_one,
    greedy,
    scheduler_of,
)
from tests.engine.mixes import (
    LOOPS,
    THINK,
    VOCAB,
    Options,
    assert_same_values,
    random_request,
    sampling,
    tokens,
)
from tests.reference.model import Reference

POOL = 160
WORKLOADS = 55
"""Per kind of engine; four kinds make 220."""

CRAMPED = {"blocks": 4, "max_model_len": 128, "max_num_seqs": 8}

ENGINES: dict[str, dict[str, Any]] = {
    "roomy": {"max_num_seqs": 16},
    "chunked-cached": {
        "max_num_batched_tokens": 40,
        "max_num_seqs": 6,
        "enable_prefix_caching": True,
    },
    "cramped": CRAMPED,
    "cramped-cached": CRAMPED | {"enable_prefix_caching": True},
}


EVERYTHING: dict[str, Any] = {
    "skip_tokenizer_init": False,
    "reasoning_parser": "ouro",
    "max_logprobs": -1,
}
"""Options of an engine that serves every request."""


@dataclass(frozen=True)
class Pooled:
    """A request and what it gave alone, by index among its n."""

    prompt: list[int]
    params: SamplingParams
    alone: list[Output]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = {"loops": LOOPS, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab": VOCAB}
    folder = tmp_path_factory.mktemp("property")
    plain = write_random(folder / "plain", **shape, seed=7)
    return with_byte_tokenizer(plain, folder / "model", reasoning=True)


@pytest.fixture(scope="module")
def pool(folder: str) -> list[Pooled]:
    """Requests with their serial outputs; a third of them stop at a token they would produce."""
    rng = random.Random(1)
    prefix = tokens(rng, 64)
    pooled = []
    with engine(folder, **EVERYTHING) as llm:

        def alone(prompt: list[int], options: Options) -> list[Output]:
            seen = drive(llm, [Arrival("alone", prompt, sampling(options))])
            return [seen["alone", index] for index in range(options.get("n", 1))]

        for _ in range(POOL):
            prompt, options = random_request(rng, prefix)
            outputs = alone(prompt, options)
            if rng.random() < 0.35 and "structured_outputs" not in options:
                stop = rng.choice(outputs[0].tokens)
                options["stop_token_ids"] = [stop, *tokens(rng, 1)]
                if rng.random() < 0.5:
                    options["min_tokens"] = rng.randint(0, options["max_tokens"])
                outputs = alone(prompt, options)
            pooled.append(Pooled(prompt, sampling(options), outputs))
    return pooled


def test_the_pool_asks_for_all_that_is_honoured_in_the_engine(pool: list[Pooled]) -> None:
    """A field that joins one of these lists must join the requests here."""
    plain = SamplingParams()
    asked = {
        name
        for request in pool
        for name in SamplingParams.__struct_fields__
        if getattr(request.params, name) != getattr(plain, name)
    }
    set_by_vllm = {"_eos_token_id", "_all_stop_token_ids", "_bad_words_token_ids"}
    on_cuda = {"prompt_logprob_token_ids", "prompt_logprob_start"}
    in_the_engine = {
        name
        for who, names in features.SAMPLING.items()
        if not who.startswith(("the API process", "nobody"))
        for name in names.split()
    }
    assert not in_the_engine - asked - set_by_vllm - on_cuda


@pytest.fixture(scope="module")
def reference(folder: str) -> Reference:
    return Reference(folder)


def margins(reference: Reference, request: Pooled, out: Output) -> list[float]:
    """How close the serial run's decisions were, by replaying its tokens in the reference."""
    depth = request.params.extra_args
    # A draft is what `exact` reads out, over the K/V of every loop; the last loop decides.
    replays = [
        reference.generate(
            request.prompt,
            len(out.tokens),
            choose=lambda logits, output: out.tokens[len(output)],
            mode="exact" if drafted(request) else depth["exit_mode"],
            **controls,
        )
        for controls in (
            {
                "threshold": depth.get("exit_threshold", 1.0),
                "rule": depth.get("exit_rule", "gate"),
                "min_loops": depth.get("min_loops", 1),
                "max_loops": depth.get("max_loops"),
                "forced_depths": depth.get("forced_depths"),
            },
            *([{}] if drafted(request) else []),
        )
    ]
    return [min(replay.margin(index) for replay in replays) for index in range(len(out.tokens))]


def drafted(request: Pooled) -> bool:
    """Whether the last loop has the last word of a request's tokens."""
    return request.params.extra_args["exit_mode"] == LOSSLESS


def workload(rng: random.Random, pool: list[Pooled]) -> tuple[list[Pooled], list[Arrival]]:
    """Two to ten requests; a fifth of them leave before they are done."""
    requests = rng.choices(pool, k=rng.randint(2, 10))
    spread = rng.choice([0, 3, 12])
    arrivals = [
        Arrival(
            name=str(number),
            prompt=request.prompt,
            params=request.params,
            step=rng.randint(0, spread),
            abort_after=rng.randint(0, 5) if rng.random() < 0.2 else None,
        )
        for number, request in enumerate(requests)
    ]
    return requests, arrivals


@pytest.mark.parametrize("kind", ENGINES)
def test_batched_equals_serial(
    kind: str, folder: str, pool: list[Pooled], reference: Reference
) -> None:
    rng = random.Random(kind)
    excused = compared = preemptions = 0
    with engine(folder, **EVERYTHING, **ENGINES[kind]) as llm:
        scheduler = scheduler_of(llm)
        preempt = scheduler._preempt_request

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal preemptions
            preemptions += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counting
        for number in range(WORKLOADS):
            requests, arrivals = workload(rng, pool)
            seen = drive(llm, arrivals)
            for arrival, request in zip(arrivals, requests, strict=True):
                for index, alone in enumerate(request.alone):
                    out = seen.get((arrival.name, index))
                    if out is None:
                        assert arrival.abort_after is not None, f"no answer to {arrival}"
                        continue
                    compared += 1
                    end = len(alone.tokens)
                    if arrival.abort_after is not None and out.finish_reason in (None, "abort"):
                        end = len(out.tokens)
                    same = (out.tokens, out.depths, alone.tokens[:end], alone.depths[:end])
                    what = f"{kind} workload {number} request {arrival.name}.{index}"
                    what = f"{what} {request.params}"
                    if same[0] == same[2] and same[1] == same[3]:
                        # What a preemption threw away of drafts is billed to no token.
                        if not (drafted(request) and kind.startswith("cramped")):
                            assert out.loops_run == alone.loops_run[:end], what
                        assert_same_values(what, out, alone)
                        if end == len(alone.tokens):
                            ended = (out.text, out.finish_reason, out.stop_reason)
                            assert ended == (alone.text, alone.finish_reason, alone.stop_reason)
                        continue
                    excused += not assert_same(what, *same, margins(reference, request, alone))
        assert_idle(llm)
    assert compared > 4 * WORKLOADS, f"only {compared} outputs compared"
    assert excused <= compared // 100, f"{excused} of {compared} excused as near ties"
    if kind.startswith("cramped"):
        assert preemptions >= 3, f"only {preemptions} preemptions"


def test_a_thought_has_its_budget_whatever_is_preempted(folder: str) -> None:
    """Thoughts that open again and again, each of as many tokens as alone."""
    requests = [
        ([5 + index] * (1 + 3 * (index % 7)), 1 + index % 4, {"exit_threshold": 0.3 * (index % 3)})
        for index in range(9)
    ]
    params = [
        greedy(45, depth, thinking_token_budget=budget, logit_bias={THINK: 100.0})
        for _, budget, depth in requests
    ]
    with engine(folder, **EVERYTHING, **CRAMPED) as llm:
        preempted = count_preemptions(llm)
        alone = [generate_one(llm, r[0], p) for r, p in zip(requests, params, strict=True)]
        assert not preempted
        for (_, budget, _), out in zip(requests, alone, strict=True):
            assert out.tokens[: 2 * budget + 3].count(THINK) >= budget
        together = generate(llm, [prompt for prompt, _, _ in requests], params)
        assert len(preempted) >= 5
    assert [out.tokens for out in together] == [out.tokens for out in alone]
