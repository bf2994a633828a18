"""The rule of the target agreement: step by step, and against answers drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from ouro_server.agreement import Agreement, Rule, Ticket
from ouro_server.bounds import at_most
from tests.server.calibration_pool import load

FLOORS = {"premium": 0.9, "batch": 0.1}
RULE = Rule(target=0.95)


def fresh(rule: Rule = RULE, ceiling: float = 1.0, whole: bool = True) -> Agreement:
    return Agreement(rule, FLOORS, ceiling, whole)


def audit(
    agreement: Agreement, agrees: Callable[[float], bool], picked: int, name: str = "batch"
) -> list[float]:
    """Let requests of a class be picked and audited; the thresholds they were served at."""
    served = []
    for _ in range(picked):
        if (ticket := agreement.assign(name)) is not None:
            served.append(ticket.threshold)
            agreement.hear(ticket, agrees(ticket.threshold))
    return served


def always(_: float) -> bool:
    return True


def never(_: float) -> bool:
    return False


def test_at_the_start_nothing_is_given_up() -> None:
    agreement = fresh()
    assert [agreement.allowed(name) for name in FLOORS] == [0, 0]
    assert [agreement.proven(name) for name in FLOORS] == [1, 1]
    assert agreement.trial("batch") == 0.85
    assert agreement.missed == []


def test_a_rung_is_proven_by_exactly_as_many_audits_as_the_bound_needs() -> None:
    agreement = fresh()
    needed = agreement.needed("batch")
    assert at_most(RULE.spare, needed, RULE.loss) <= 0.025 < at_most(2, needed - 1, RULE.loss)
    audit(agreement, always, needed - 1)
    assert agreement.allowed("batch") == 0
    audit(agreement, always, 1)
    assert agreement.allowed("batch") == pytest.approx(1 / RULE.rungs)
    assert agreement.proven("batch") == 0.85
    assert agreement.outcomes == {"proven": 1, "failed": 0, "withdrawn": 0}
    assert agreement.allowed("premium") == 0


def test_answers_that_agree_lead_down_to_the_floor_and_no_further() -> None:
    agreement = fresh()
    served = audit(agreement, always, 3000)
    assert agreement.allowed("batch") == 1
    assert agreement.proven("batch") == 0.1 == min(served)
    assert agreement.trial("batch") is None
    assert sorted(set(served), reverse=True) == [0.85, 0.7, 0.55, 0.4, 0.25, 0.1]


def test_nobody_is_served_below_the_rung_that_is_tried() -> None:
    agreement = fresh()
    for _ in range(3000):
        before = agreement.allowed("batch")
        (threshold,) = audit(agreement, always, 1) or [1.0]
        lowest = 1 - 0.9 * (before + 1 / RULE.rungs)
        assert threshold >= lowest - 1e-4


def test_a_try_fails_with_the_first_loss_too_many_and_rests() -> None:
    agreement = fresh()
    audit(agreement, never, RULE.spare)
    assert agreement.trial("batch") == 0.85
    audit(agreement, never, 1)
    assert agreement.trial("batch") is None
    assert agreement.outcomes["failed"] == 1
    rest = RULE.audits(0)
    assert audit(agreement, always, rest) == []
    assert agreement.trial("batch") == 0.85
    assert agreement.needed("batch") == RULE.audits(1) > RULE.audits(0)


def test_every_further_try_waits_longer_and_is_held_to_a_smaller_error() -> None:
    agreement = fresh()
    waits = []
    for tries in range(4):
        assert agreement.needed("batch") == RULE.audits(tries)
        audit(agreement, never, RULE.spare + 1)
        waits.append(0)
        while agreement.trial("batch") is None:
            agreement.assign("batch")
            waits[-1] += 1
    assert waits == [RULE.audits(0) * 2**n for n in range(4)]


def test_a_proven_rung_that_goes_bad_is_withdrawn() -> None:
    agreement = fresh()
    audit(agreement, always, 3000)
    lost = 0
    while agreement.allowed("batch") == 1:
        audit(agreement, never, 1)
        lost += 1
    assert 1 - at_most(lost - 1, RULE.audits(0), RULE.loss) <= 0.05
    assert 1 - at_most(lost - 2, RULE.audits(0), RULE.loss) > 0.05
    assert agreement.outcomes["withdrawn"] == 1
    audit(agreement, never, 3000)
    assert agreement.allowed("batch") == 0


def test_a_proven_rung_stays_while_its_losses_are_within_the_target() -> None:
    agreement = fresh()
    audit(agreement, always, 3000)
    rng = random.Random(1)
    audit(agreement, lambda _: rng.random() > 0.02, 20000)
    assert agreement.allowed("batch") == 1


def test_verdicts_of_an_earlier_test_count_no_more() -> None:
    agreement = fresh()
    old = [ticket for _ in range(50) if (ticket := agreement.assign("batch")) is not None]
    audit(agreement, always, agreement.needed("batch"))
    for ticket in old:
        agreement.hear(ticket, False)
    assert agreement.allowed("batch") > 0
    assert agreement.ladders["batch"].missed == 0


def test_an_operators_default_under_1_has_to_be_proven_too() -> None:
    agreement = fresh(ceiling=0.6, whole=False)
    assert agreement.trial("batch") == 0.6
    assert agreement.missed == []
    audit(agreement, never, RULE.spare + 1)
    assert agreement.missed == ["batch"]
    assert agreement.allowed("batch") == 0
    audit(agreement, always, 1000)
    assert agreement.missed == []
    assert agreement.allowed("batch") > 0


def test_where_the_floor_is_no_lower_there_is_only_the_default_to_prove() -> None:
    agreement = fresh(ceiling=0.6, whole=False)
    audit(agreement, always, 1000, "premium")
    assert agreement.outcomes["proven"] == 1
    assert agreement.proven("premium") == 0.6
    assert agreement.trial("premium") is None


def test_another_default_begins_anew() -> None:
    agreement = fresh()
    audit(agreement, always, 500)
    old = agreement.assign("batch")
    assert old is not None and agreement.allowed("batch") > 0
    agreement.follow(1.0, True)
    assert agreement.allowed("batch") > 0
    agreement.follow(0.8, False)
    assert agreement.allowed("batch") == 0
    assert agreement.trial("batch") == 0.8
    agreement.hear(old, False)
    assert agreement.ladders["batch"].audits == 0


@pytest.mark.parametrize("loss", [0.05, 0.06, 0.1])
def test_a_threshold_that_loses_too_much_passes_no_more_often_than_the_error(loss: float) -> None:
    """Over all tries of many servers, each long enough for six."""
    rng, servers, passed = random.Random(3), 200, 0
    for _ in range(servers):
        agreement = fresh()
        for _ in range(6):
            agreement.ladders["batch"].rest = 0
            while agreement.trial("batch") == 0.85:
                ticket = agreement.assign("batch")
                assert isinstance(ticket, Ticket)
                agreement.hear(ticket, rng.random() >= loss)
            if agreement.allowed("batch") > 0:
                passed += 1
                break
    slack = next(k for k in range(servers) if at_most(k, servers, 1 - RULE.confidence) > 0.999)
    assert passed <= slack


def test_it_ends_at_the_lowest_rung_that_holds() -> None:
    """Answers are lost as ouro-mini's are: none above 0.6, ever more below."""
    rng = random.Random(5)
    agreement = fresh(Rule(target=0.98))
    audit(agreement, lambda q: rng.random() >= max(0.0, 0.6 - q) * 0.15, 60_000)
    assert 0.25 < agreement.proven("batch") <= 0.55


def test_of_ouro_minis_own_answers_it_proves_no_threshold_that_loses_too_much() -> None:
    """Servers that audit random problems of the calibration pool, long enough to come to rest. A
    rung loses what the next lower threshold of the pool does."""
    thresholds, lost = load()
    rule, floors, servers = Rule(target=0.98), {"standard": 0.3}, 30
    rng = np.random.default_rng(11)
    broke, deep = 0, []
    for _ in range(servers):
        agreement = Agreement(rule, floors, 1.0, True)
        for problem in rng.integers(lost.shape[1], size=3000):
            if (ticket := agreement.assign("standard")) is not None:
                row = next(i for i, q in enumerate(thresholds) if q <= ticket.threshold)
                agreement.hear(ticket, not lost[row, problem])
        proven = agreement.proven("standard")
        deep.append(proven)
        row = next(i for i, q in enumerate(thresholds) if q <= proven)
        broke += lost[row].mean() > rule.loss
    slack = next(k for k in range(servers) if at_most(k, servers, 1 - rule.confidence) > 0.999)
    assert broke <= slack
    assert np.median(deep) < 0.7
