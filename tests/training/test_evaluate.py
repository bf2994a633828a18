"""The targets of `ouro-mini` hold where they should, and can fail."""

import json

import pytest

from ouro_runtime.training.evaluate import Check, Result, Score, Setting, check_shared, checks
from ouro_runtime.training.reference import Controls
from ouro_runtime.training.tasks import FAMILIES

DEPTHS = {1: 10, 2: 50, 3: 95, 4: 99}
"""Problems right of 100, by fixed depth."""


def result(controls: Controls, right: int, depth_of_level: list[int]) -> Result:
    """The same score in every cell; tokens of level n are all at depth `depth_of_level[n - 1]`."""
    cells = {}
    for name, family in FAMILIES.items():
        for level in range(1, family.top + 1):
            depth = depth_of_level[min(level, len(depth_of_level)) - 1]
            histogram = [100 * (level if d == depth else 0) for d in range(1, 5)]
            cells[name, level] = Score(100, right, sum(histogram), histogram)
    return Result(Setting("shipped", controls), cells)


def told(right: dict[int, int], gated: Result, target: str = "") -> list[Check]:
    """The targets that begin with `target`."""
    fixed = [result(Controls(max_loops=d), n, [d]) for d, n in right.items()]
    return [check for check in checks(fixed, [gated])[0] if check.target.startswith(target)]


def mixed(right: int = 99, turned: str = "") -> Result:
    """A gate of mean depth below 2, which grows with difficulty but in the family `turned`."""
    gated = result(Controls(0.5, 1, 4), right, [1])
    for (family, level), score in gated.cells.items():
        deep = 20 - level if family == turned else level
        score.histogram[:] = [100 - deep, deep, 0, 0]
        score.tokens = 100
    return gated


def test_all_hold() -> None:
    verdicts = told(DEPTHS, mixed())
    assert len(verdicts) == 7 and all(check.holds for check in verdicts)


@pytest.mark.parametrize(
    ("target", "right", "gated"),
    [
        ("full depth, middle", DEPTHS | {4: 94}, mixed(94)),
        ("full depth, hardest", DEPTHS | {4: 79}, mixed()),
        ("three families", DEPTHS | {2: 90}, mixed()),
        ("three families", DEPTHS | {1: 60}, mixed()),
        ("no family loses > 1 point from depth 3 to 4", DEPTHS | {3: 100, 4: 98}, mixed(98)),
        ("mean depth <= 2.0 within 1 point of full depth", DEPTHS, result(Controls(0.5), 99, [3])),
        ("at equal mean depth: gate beats fixed depth by >= 5 points somewhere", DEPTHS, mixed(9)),
    ],
)
def test_each_can_fail(target: str, right: dict[int, int], gated: Result) -> None:
    (verdict,) = told(right, gated, target)
    assert not verdict.holds


def test_depth_must_grow_in_three_families_and_says_where_it_does_not() -> None:
    grows = "in three of those families mean depth grows with difficulty"
    (one,) = told(DEPTHS, mixed(turned="sum"), grows)
    assert one.holds == (len(FAMILIES) - 1 >= 3)
    assert one.measured.count("(not at every step)") == 1
    (flat,) = told(DEPTHS, result(Controls(0.5), 99, [1]), grows)
    assert not flat.holds


def test_shared_is_held_against_skip_at_the_same_controls() -> None:
    right = {
        Controls(): 99,
        Controls(exit_mode="shared"): 98,
        Controls(0.5): 99,
        Controls(0.5, exit_mode="shared"): 97,
        Controls(0.7): 0,
    }
    full, half = check_shared([result(c, n, [2]) for c, n in right.items()])
    assert full.holds and "full depth" in full.target
    assert not half.holds and half.measured == "97.00 of 99.00 %"
    assert not check_shared([result(Controls(), 99, [4])]), "not measured, not checked"


def test_a_kept_result_is_read_as_it_was_written() -> None:
    for controls in (Controls(0.5), Controls(0.4, exit_rule="delta"), Controls(max_loops=2)):
        made = result(controls, 99, [1, 2])
        assert Result.from_dict(json.loads(json.dumps(made.to_dict()))) == made
