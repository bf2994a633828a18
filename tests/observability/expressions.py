"""The PromQL of the dashboard, of the alert rules and of the autoscaler."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "docker/prometheus/prometheus.yml"
RULES = ROOT / "docker/prometheus/rules.yml"
DASHBOARD = ROOT / "docker/grafana/dashboards/ouro.json"
AUTOSCALER = ROOT / "docker/k8s/autoscaler.yaml"

VARIABLES = {"$model": ".*", "$__rate_interval": "1m", "$__range": "1m"}
"""What Grafana puts in place of the dashboard's variables."""


def of_dashboard() -> dict[str, str]:
    """Panel and query -> expression, variables filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {
        f"{panel['title']} ({panel['type']}) {target['refId']}": filled(target["expr"])
        for panel in panels
        for target in panel.get("targets", [])
    }


def of_rules() -> dict[str, str]:
    """Alert -> expression."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def of_autoscaler() -> dict[str, str]:
    """Trigger -> query, without the label that only a cluster's Prometheus puts on."""
    triggers = yaml.safe_load(AUTOSCALER.read_text())["spec"]["triggers"]
    label = '{namespace="ouro"}'
    assert all(label in trigger["metadata"]["query"] for trigger in triggers)
    return {t["name"]: t["metadata"]["query"].replace(label, "") for t in triggers}


def filled(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, f"an unknown variable in {expression}"
    return expression


def undecided(expression: str) -> str:
    """The same with comparisons that answer 0 or 1: it has a value whenever both sides have one,
    so an alert that does not fire can be told from one that never could."""
    parts = re.split(r"(\{[^}]*\})", expression)
    parts[::2] = [re.sub(r"(==|!=|>=|<=|>|<)", r"\1 bool", part) for part in parts[::2]]
    return "".join(parts)


def metrics(expression: str) -> set[str]:
    """The metrics it names."""
    return set(re.findall(r"\b(?:ouro_|vllm:|up\b)[\w:]*", re.sub(r"\{[^}]*\}", "", expression)))
