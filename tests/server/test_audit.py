"""Audits from the request to the verdict, against an engine that answers as it is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from ouro_runtime.config import DepthError
from ouro_server.agreement import Agreement, Rule
from ouro_server.honest_status import Progress, _progress
from ouro_server.resolve import Resolved
from tests.server.auditing import PROMPT, SKIP, WHOLE, Bench, params, run
from tests.server.fakes import CONFIG, LOOPS


def coming(source: str = "default", preset: str | None = None, name: str | None = None) -> None:
    """What follows is a request whose depth came from there."""
    progress = Progress(resolved=Resolved(CONFIG.defaults, source, preset, name))
    _progress.set(progress)


@pytest.mark.parametrize("kind", list(RequestOutputKind), ids=lambda kind: kind.name)
def test_every_token_of_an_answer_is_judged_however_it_was_sent(kind: RequestOutputKind) -> None:
    async def play(bench: Bench) -> None:
        bench.engine.other = {101}
        await bench.ask(params(output_kind=kind))
        await bench.until(lambda: bench.count("audited_requests_total") == 1)

    bench = run(Bench(), play)
    assert bench.counts() == [1, 0, 3, 2]
    prompt, asked, _ = bench.engine.audits[0]
    assert prompt["prompt_token_ids"] == [1, 2, 3, 100, 101, 102]
    assert asked.prompt_logprobs == 1 and asked.max_tokens == 1
    assert asked.extra_args == WHOLE


def test_verdicts_are_counted_by_what_set_the_depth() -> None:
    async def play(bench: Bench) -> None:
        coming("preset", "fast")
        await bench.ask()
        await bench.until(lambda: bench.count("audited_requests_total", "preset", "fast") == 1)

    bench = run(Bench(), play)
    assert bench.count("agreeing_requests_total", "preset", "fast") == 1
    assert bench.counts() == [0, 0, 0, 0]


def test_sampled_answers_are_judged_by_log_probabilities_that_nobody_else_sees() -> None:
    async def play(bench: Bench) -> None:
        (answer,) = await bench.ask(params(temperature=1.0))
        assert answer.outputs[0].logprobs is None
        assert answer.outputs[0].cumulative_logprob is None
        await bench.until(lambda: bench.count("audit_logprob_difference_count") == 1)

    bench = run(Bench(), play)
    assert bench.count("audit_logprob_difference_sum") == pytest.approx(0.25)
    assert bench.engine.asked[0].logprobs == 0
    assert bench.counts() == [0, 0, 0, 0]


def test_log_probabilities_that_were_asked_for_stay() -> None:
    async def play(bench: Bench) -> None:
        (answer,) = await bench.ask(params(temperature=1.0, logprobs=3))
        assert len(answer.outputs[0].logprobs) == 3
        await bench.until(lambda: bench.count("audit_logprob_difference_count") == 1)

    assert run(Bench(), play).engine.asked[0].logprobs == 3


@pytest.mark.parametrize(
    "asked",
    [
        params(WHOLE),
        params(SKIP | {"exit_mode": "lossless"}),
        params(SKIP | {"exit_rule": "delta", "exit_threshold": 0.0}),
    ],
    ids=["every loop", "lossless", "a rule that is off"],
)
def test_what_cannot_skip_is_left_alone(asked: Any) -> None:
    async def play(bench: Bench) -> None:
        await bench.ask(asked)

    bench = run(Bench(), play)
    assert bench.engine.asked == [asked]
    assert bench.engine.audits == []


@pytest.mark.parametrize(
    "depth",
    [
        {"exit_rule": "margin"},
        {"exit_rule": "delta", "exit_threshold": 1.0},
        {"exit_mode": "exact"},
        {"exit_mode": "shared", "exit_threshold": 1.0},
    ],
)
def test_whatever_a_token_leaves_by_it_is_audited(depth: dict[str, Any]) -> None:
    async def play(bench: Bench) -> None:
        await bench.ask(params(SKIP | depth))
        await bench.until(lambda: bench.count("audited_requests_total") == 1)

    run(Bench(), play)


def test_an_answer_that_skipped_nothing_needs_no_audit() -> None:
    async def play(bench: Bench) -> None:
        bench.engine.depths = [LOOPS, LOOPS]
        await bench.ask()
        assert bench.auditor.waiting == 0

    assert run(Bench(), play).unaudited() == {}


def test_in_shared_an_answer_that_ran_every_loop_may_be_another() -> None:
    async def play(bench: Bench) -> None:
        bench.engine.depths = [LOOPS, LOOPS]
        bench.engine.other = {101}
        await bench.ask(params(SKIP | {"exit_mode": "shared"}))
        await bench.until(lambda: bench.count("audited_requests_total") == 1)

    assert run(Bench(), play).counts() == [1, 0, 2, 1]


def test_an_answer_that_does_not_fit_into_the_pool_at_full_depth_is_too_long() -> None:
    async def play(bench: Bench) -> None:
        bench.engine.fail = DepthError("prompt", "does not fit")
        await bench.ask()
        await bench.until(lambda: bool(bench.unaudited()))

    assert run(Bench(), play).unaudited() == {"long": 1}


ALTERED = {
    "presence_penalty": 0.5,
    "repetition_penalty": 1.2,
    "logit_bias": {5: 1.0},
    "min_tokens": 2,
    "bad_words": ["x"],
    "structured_outputs": StructuredOutputsParams(regex="a+"),
}


@pytest.mark.parametrize("field", ALTERED)
def test_greedy_answers_that_are_not_the_models_alone_are_counted_as_such(field: str) -> None:
    async def play(bench: Bench) -> None:
        await bench.ask(params(**{field: ALTERED[field]}))
        await bench.ask(params(temperature=1.0, **{field: ALTERED[field]}))
        await bench.until(lambda: bench.count("audit_logprob_difference_count") == 1)

    bench = run(Bench(), play)
    assert bench.unaudited() == {"altered": 1}
    assert len(bench.engine.audits) == 1


@pytest.mark.parametrize(
    ("options", "temperature"), [({"open_logits": True}, 0.0), ({"raw": False}, 1.0)]
)
def test_servers_whose_logits_are_others_count_them_as_altered(
    options: dict[str, Any], temperature: float
) -> None:
    async def play(bench: Bench) -> None:
        await bench.ask(params(temperature=temperature))

    assert run(Bench(**options), play).unaudited() == {"altered": 1}


@pytest.mark.parametrize("finish", ["abort", "error", None])
def test_answers_that_are_not_whole_are_not_audited(finish: str | None) -> None:
    async def play(bench: Bench) -> None:
        bench.engine.finish = finish
        await bench.ask()
        assert bench.auditor.waiting == 0

    run(Bench(), play)


def test_a_client_that_leaves_leaves_nothing() -> None:
    async def play(bench: Bench) -> None:
        asked = params(output_kind=RequestOutputKind.DELTA)
        results = bench.client.generate(PROMPT, asked, "cmpl-1")
        await anext(results)
        assert not bench.room.takes(1000)
        await results.aclose()
        assert bench.auditor.waiting == 0
        assert bench.room.takes(1000)

    run(Bench(), play)


def test_before_anybody_asks_both_kinds_of_log_probabilities_were_asked_for() -> None:
    async def play(bench: Bench) -> None:
        await bench.auditor.warm_up()

    bench = run(Bench(), play)
    ((prompt, asked, _),) = bench.engine.audits
    assert len(prompt["prompt_token_ids"]) == 4
    assert (asked.prompt_logprobs, asked.logprobs) == (1, 0)
    assert bench.counts() == [0, 0, 0, 0]


def test_the_share_is_a_share() -> None:
    async def play(bench: Bench) -> None:
        drawn = [bench.picker.pick(params(), None) is not None for _ in range(4000)]
        assert 300 < sum(drawn) < 500

    run(Bench(share=0.1), play)


def test_a_beam_search_is_not_audited() -> None:
    async def play(bench: Bench) -> None:
        _progress.set(Progress(fields=["use_beam_search"]))
        await bench.ask()
        assert bench.auditor.waiting == 0

    run(Bench(), play)


def test_an_adapter_and_a_salt_go_along() -> None:
    adapter = SimpleNamespace(lora_name="a", lora_int_id=3)

    async def play(bench: Bench) -> None:
        await bench.ask(prompt=PROMPT | {"cache_salt": "salt"}, lora_request=adapter)
        await bench.until(lambda: bench.count("audited_requests_total") == 1)

    bench = run(Bench(adapters={"a": adapter}), play)
    prompt, _, options = bench.engine.audits[0]
    assert prompt["cache_salt"] == "salt"
    assert options["lora_request"] is adapter


def test_an_adapter_that_was_loaded_later_is_known() -> None:
    loaded: dict[str, Any] = {}
    adapter = SimpleNamespace(lora_name="a", lora_int_id=3)

    async def play(bench: Bench) -> None:
        loaded["a"] = adapter
        await bench.ask(lora_request=adapter)
        await bench.until(lambda: bench.count("audited_requests_total") == 1)

    run(Bench(adapters=loaded), play)


def test_an_adapter_that_is_gone_is_not_loaded_again() -> None:
    async def play(bench: Bench) -> None:
        await bench.ask(lora_request=SimpleNamespace(lora_name="a", lora_int_id=3))
        await bench.until(lambda: bool(bench.unaudited()))

    bench = run(Bench(), play)
    assert bench.unaudited() == {"failed": 1}
    assert bench.engine.audits == []


def test_an_answer_as_long_as_the_model_is_not_audited() -> None:
    async def play(bench: Bench) -> None:
        await bench.ask()

    assert run(Bench(longest=6), play).unaudited() == {"long": 1}


FLOORS = {"batch": 0.1}


def agreement() -> Agreement:
    return Agreement(Rule(target=0.9), FLOORS, 1.0, True)


def test_a_request_that_sets_no_depth_tries_a_threshold() -> None:
    rule = agreement()

    async def play(bench: Bench) -> None:
        coming(name="batch")
        asked = params(WHOLE)
        await bench.ask(asked)
        assert asked.extra_args == WHOLE, "the caller's own params are another's too"
        await bench.until(lambda: rule.ladders["batch"].audits == 1)

    bench = run(Bench(agreement=rule), play)
    assert bench.engine.asked[0].extra_args == SKIP | {"exit_threshold": 0.85}
    assert bench.counts() == [1, 1, 3, 3]


def test_a_trial_that_needed_every_loop_counts_as_agreeing() -> None:
    rule = agreement()

    async def play(bench: Bench) -> None:
        coming(name="batch")
        bench.engine.depths = [LOOPS] * 3
        await bench.ask(params(WHOLE))

    bench = run(Bench(agreement=rule), play)
    assert rule.ladders["batch"].audits == 1
    assert bench.engine.audits == []


@pytest.mark.parametrize(
    ("source", "preset", "temperature"),
    [("request", None, 0.0), ("preset", "fast", 0.0), ("default", None, 1.0)],
    ids=["own fields", "preset", "sampled"],
)
def test_other_requests_are_not_tried_on(
    source: str, preset: str | None, temperature: float
) -> None:
    rule = agreement()

    async def play(bench: Bench) -> None:
        coming(source, preset, "batch")
        await bench.ask(params(SKIP, temperature=temperature))
        await bench.until(lambda: len(bench.engine.audits) == 1)

    bench = run(Bench(agreement=rule), play)
    assert bench.engine.asked[0].extra_args == SKIP
    assert rule.ladders["batch"].audits == 0


def test_an_answer_that_is_lost_counts_against_the_threshold() -> None:
    rule = agreement()

    async def play(bench: Bench) -> None:
        coming(name="batch")
        bench.engine.other = {102}
        await bench.ask(params(WHOLE))
        await bench.until(lambda: rule.ladders["batch"].missed == 1)

    run(Bench(agreement=rule), play)
