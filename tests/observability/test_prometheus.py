"""The dashboard and the alert rules against a real Prometheus, a real server and real load."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.debian import need
from tests.observability.expressions import (
    ROOT,
    metrics,
    of_autoscaler,
    of_dashboard,
    of_rules,
    undecided,
)
from tests.observability.load import drive
from tests.observability.prometheus import Prometheus
from tests.observability.prometheus import start as start_prometheus
from tests.server.live import Live
from tests.server.live import start as start_server

pytestmark = pytest.mark.slow

SCRAPES_SECONDS = 2.5
"""Long enough for two scrapes and an evaluation of the rules."""

DASHBOARD = of_dashboard()
AUTOSCALER = of_autoscaler()
RULES = of_rules()
TABLE_ROW = re.compile(r"^\| `(ouro_\w+)(?:\{([\w, ]+)\})?` \| (\w+) \|", re.MULTILINE)


@dataclass
class Watched:
    """A server that has been under load while Prometheus watched."""

    server: Live
    prometheus: Prometheus


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    need("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        start_server(
            "--target-tpot-ms", "1000", "--target-agreement", "0.9", "--audit", "1"
        ) as server,
        start_prometheus(folder, server.url.removeprefix("http://")) as prometheus,
    ):
        prometheus.wait_for_a_scrape()
        # A rate needs a series to be there before it rises: everything twice.
        for _ in range(2):
            assert drive(server) > 0
            time.sleep(SCRAPES_SECONDS)
        yield Watched(server, prometheus)


@pytest.mark.parametrize("query", DASHBOARD)
def test_every_query_of_the_dashboard_returns_data(watched: Watched, query: str) -> None:
    assert metrics(DASHBOARD[query]) <= watched.prometheus.names()
    assert watched.prometheus.values(DASHBOARD[query]), DASHBOARD[query]


@pytest.mark.parametrize("trigger", AUTOSCALER)
def test_the_autoscaler_has_one_number_to_go_by(watched: Watched, trigger: str) -> None:
    assert len(watched.prometheus.values(AUTOSCALER[trigger])) == 1


@pytest.mark.parametrize("alert", RULES)
def test_every_alert_could_fire(watched: Watched, alert: str) -> None:
    assert metrics(RULES[alert]) <= watched.prometheus.names()
    assert watched.prometheus.values(undecided(RULES[alert])), RULES[alert]


def test_rules_are_evaluated_and_none_fires_on_a_healthy_server(watched: Watched) -> None:
    (group,) = watched.prometheus.get("rules")["groups"]
    assert {rule["name"] for rule in group["rules"]} == set(RULES)
    for rule in group["rules"]:
        assert rule["health"] == "ok", rule
        assert rule["state"] != "firing", rule


def test_the_documented_metrics_are_the_exported_ones(watched: Watched) -> None:
    """Name, type and labels of `ouro_*` in docs/operations.md."""
    exported = {}
    for family in text_string_to_metric_families(watched.server.http.get("/metrics").text):
        # The client library adds to each counter when it began to count.
        if family.name.startswith("ouro_") and not family.name.endswith("_created"):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = {label for sample in family.samples for label in sample.labels}
            exported[name] = (labels - {"model_name", "le"}, family.type)
    documented = {
        name: (set(filter(None, labels.split(", "))), kind)
        for name, labels, kind in TABLE_ROW.findall((ROOT / "docs/operations.md").read_text())
    }
    assert documented == exported


def test_our_metrics_follow_prometheus_conventions(watched: Watched) -> None:
    text = watched.server.http.get("/metrics").text
    own = [line for line in text.splitlines() if re.match(r"(# \w+ )?ouro_", line)]
    done = subprocess.run(
        [need("promtool"), "check", "metrics"],
        input="\n".join(own) + "\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
