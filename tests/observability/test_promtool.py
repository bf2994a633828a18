"""The shipped Prometheus files, as Prometheus' own tool sees them."""

from __future__ import annotations

import subprocess

import pytest

from tests.debian import need
from tests.observability.expressions import CONFIG, of_rules, undecided


@pytest.mark.parametrize(
    "command",
    ["check config prometheus.yml", "check rules rules.yml", "test rules rules_test.yml"],
)
def test_promtool_agrees(command: str) -> None:
    done = subprocess.run(
        [need("promtool"), *command.split()], cwd=CONFIG.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    tests = (CONFIG.parent / "rules_test.yml").read_text()
    for alert in of_rules():
        assert f"alertname: {alert}\n" in tests, alert


def test_comparisons_are_made_to_answer_but_matchers_stay() -> None:
    assert undecided('a{x!="y"} == 1 and b > 2 * c') == 'a{x!="y"} == bool 1 and b > bool 2 * c'
