"""Batched equals serial, tokens and depths, over random workloads.

A pool of random requests is run one by one in a roomy engine. Then workloads of requests drawn from
the pool, with random arrivals and departures, run in engines of three kinds; whatever shares the
batch, each request must come out as it did alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine.checkpoints import write_random
from tests.engine.compare import assert_same
from tests.engine.harness import Arrival, Output, assert_idle, drive, engine, scheduler_of
from tests.reference.model import Reference

LOOPS, VOCAB = 4, 128
POOL = 120
WORKLOADS = 70
"""Per kind of engine; three kinds make 210."""

ENGINES: dict[str, dict[str, Any]] = {
    "roomy": {"max_num_seqs": 16},
    "chunked-cached": {
        "max_num_batched_tokens": 40,
        "max_num_seqs": 6,
        "enable_prefix_caching": True,
    },
    "cramped": {"num_gpu_blocks_override": 6, "max_model_len": 128, "max_num_seqs": 8},
}


@dataclass(frozen=True)
class Pooled:
    """A request and what it gave alone, by index among its n."""

    prompt: list[int]
    params: SamplingParams
    alone: list[Output]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = {"loops": LOOPS, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab": VOCAB}
    return write_random(tmp_path_factory.mktemp("property") / "model", **shape, seed=7)


def depth_fields(rng: random.Random) -> dict[str, Any]:
    fields: dict[str, Any] = {"exit_mode": rng.choice(["skip", "skip", "exact"])}
    if rng.random() < 0.5:
        depths = [rng.randint(1, LOOPS) for _ in range(rng.randint(1, 9))]
        return fields | {"forced_depths": depths}
    fields["exit_threshold"] = rng.choice([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    if rng.random() < 0.3:
        fields["min_loops"] = rng.randint(1, LOOPS)
    return fields


def random_request(rng: random.Random, prefix: list[int]) -> tuple[list[int], dict[str, Any]]:
    """A prompt, now and then with the common prefix, and sampling options."""
    prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 8, 24, 29, 31, 40]))]
    if rng.random() < 0.4:
        prompt = prefix + prompt
    options: dict[str, Any] = {
        "max_tokens": rng.randint(1, 14),
        "temperature": 0.0,
        "extra_args": depth_fields(rng),
    }
    if rng.random() < 0.4:
        options |= {"temperature": rng.choice([0.5, 1.0, 1.5]), "seed": rng.randrange(1 << 30)}
        options |= rng.choice([{}, {"top_p": 0.8}, {"top_k": 12}, {"min_p": 0.05}])
        if rng.random() < 0.2:
            options["n"] = rng.randint(2, 3)
    if rng.random() < 0.4:
        options |= rng.choice(
            [
                {"presence_penalty": 1.0},
                {"frequency_penalty": 0.7},
                {"repetition_penalty": 1.3},
            ]
        )
    if rng.random() < 0.2:
        options["logit_bias"] = {rng.randrange(VOCAB): rng.choice([-4.0, 3.0]) for _ in range(3)}
    if rng.random() < 0.2:
        options["allowed_token_ids"] = rng.sample(range(VOCAB), 40)
    if rng.random() < 0.3:
        options["logprobs"] = rng.randint(0, 3)
    return prompt, options


def sampling(options: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**{"ignore_eos": True, "detokenize": False} | options)


@pytest.fixture(scope="module")
def pool(folder: str) -> list[Pooled]:
    """Requests with their serial outputs; a third of them stop at a token they would produce."""
    rng = random.Random(1)
    prefix = [rng.randrange(VOCAB) for _ in range(64)]
    pooled = []
    with engine(folder) as llm:

        def alone(prompt: list[int], options: dict[str, Any]) -> list[Output]:
            seen = drive(llm, [Arrival("alone", prompt, sampling(options))])
            return [seen["alone", index] for index in range(options.get("n", 1))]

        for _ in range(POOL):
            prompt, options = random_request(rng, prefix)
            outputs = alone(prompt, options)
            if rng.random() < 0.35:
                stop = rng.choice(outputs[0].tokens)
                options["stop_token_ids"] = [stop, rng.randrange(VOCAB)]
                if rng.random() < 0.5:
                    options["min_tokens"] = rng.randint(0, options["max_tokens"])
                outputs = alone(prompt, options)
            pooled.append(Pooled(prompt, sampling(options), outputs))
    return pooled


@pytest.fixture(scope="module")
def reference(folder: str) -> Reference:
    return Reference(folder)


def margins(reference: Reference, request: Pooled, out: Output) -> list[float]:
    """How close the serial run's decisions were, by replaying its tokens in the reference."""
    depth = request.params.extra_args
    replay = reference.generate(
        request.prompt,
        len(out.tokens),
        threshold=depth.get("exit_threshold", 1.0),
        mode=depth["exit_mode"],
        min_loops=depth.get("min_loops", 1),
        forced_depths=depth.get("forced_depths"),
        choose=lambda logits, output: out.tokens[len(output)],
    )
    return [replay.margin(index) for index in range(len(out.tokens))]


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
    with engine(folder, **ENGINES[kind]) as llm:
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
                    if same[0] == same[2] and same[1] == same[3]:
                        assert out.loops_run == alone.loops_run[:end]
                        continue
                    what = f"{kind} workload {number} request {arrival.name}.{index}"
                    what = f"{what} {request.params}"
                    excused += not assert_same(what, *same, margins(reference, request, alone))
        assert_idle(llm)
    assert compared > 4 * WORKLOADS, f"only {compared} outputs compared"
    assert excused <= compared // 100, f"{excused} of {compared} excused as near ties"
    if kind == "cramped":
        assert preemptions >= 8, f"only {preemptions} preemptions"
