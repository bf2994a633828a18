"""The server's own `ouro_*` metrics against a private registry."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ouro_runtime.config import ExitParams
from ouro_runtime.metrics import DepthMetrics
from ouro_server.defaults import Defaults
from ouro_server.metrics import ServerMetrics

PRESETS = ("fast", "full")
CLASSES = ("premium", "batch")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> ServerMetrics:
    return ServerMetrics("m", 4, PRESETS, CLASSES, registry)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, {"model_name": "m"} | labels)


def test_every_label_value_is_exported_from_the_start(
    registry: CollectorRegistry, metrics: ServerMetrics
) -> None:
    origins = [("default", ""), ("request", "")]
    sources = ("request", "preset", "reasoning_effort", "alias")
    origins += [(source, preset) for source in sources for preset in PRESETS]
    for source, preset in origins:
        labels = {"source": source, "preset": preset}
        assert value(registry, "ouro_requests_total", **labels) == 0
        for depth in "1234":
            assert value(registry, "ouro_source_tokens_total", depth=depth, **labels) == 0
    for direction in ("up", "down"):
        assert value(registry, "ouro_controller_changes_total", direction=direction) == 0
    assert value(registry, "ouro_controller_active") == 0
    assert value(registry, "ouro_controller_target_seconds") == 0
    assert math.isnan(value(registry, "ouro_controller_p95_seconds") or 0)


def test_generations_are_counted_by_what_set_their_depth(
    registry: CollectorRegistry, metrics: ServerMetrics
) -> None:
    metrics.count("default", None, {4: 3})
    metrics.count("preset", "fast", {1: 5, 2: 2})
    metrics.count("preset", "fast", {2: 1})
    metrics.count("request", "fast", {})
    fast = {"source": "preset", "preset": "fast"}
    assert value(registry, "ouro_requests_total", source="default", preset="") == 1
    assert value(registry, "ouro_requests_total", **fast) == 2
    assert value(registry, "ouro_requests_total", source="request", preset="fast") == 1
    tokens = [value(registry, "ouro_source_tokens_total", depth=d, **fast) for d in "1234"]
    assert tokens == [5, 3, 0, 0]


def test_thresholds_are_those_in_force_at_the_scrape(
    registry: CollectorRegistry, metrics: ServerMetrics
) -> None:
    defaults = Defaults(ExitParams(0.8, 1, 4, "skip"), 4)
    metrics.watch(defaults)

    def shown() -> list[float | None]:
        return [value(registry, "ouro_exit_threshold", priority_class=c) for c in CLASSES]

    assert shown() == [0.8, 0.8]
    defaults.steer({"batch": 0.2})
    assert shown() == [0.8, 0.2]
    defaults.change({"exit_threshold": 0.9})
    assert shown() == [0.9, 0.2]


def test_without_classes_there_is_one_threshold(registry: CollectorRegistry) -> None:
    metrics = ServerMetrics("m", 4, (), (), registry)
    metrics.watch(Defaults(ExitParams(0.8, 1, 4, "skip"), 4))
    assert value(registry, "ouro_exit_threshold", priority_class="") == 0.8


def test_the_controller_is_shown(registry: CollectorRegistry, metrics: ServerMetrics) -> None:
    metrics.show_controller(True, 0.02)
    metrics.show_reading(0.015)
    metrics.count_change("down")
    assert value(registry, "ouro_controller_active") == 1
    assert value(registry, "ouro_controller_target_seconds") == 0.02
    assert value(registry, "ouro_controller_p95_seconds") == 0.015
    assert value(registry, "ouro_controller_changes_total", direction="down") == 1


def test_a_second_server_in_the_process_starts_anew(registry: CollectorRegistry) -> None:
    for loops in (4, 6):
        DepthMetrics("m", loops, registry)
        ServerMetrics("m", loops, PRESETS, CLASSES, registry).count("default", None, {loops: 1})
    labels = {"source": "default", "preset": ""}
    assert value(registry, "ouro_source_tokens_total", depth="4", **labels) == 0
    assert value(registry, "ouro_source_tokens_total", depth="6", **labels) == 1


def test_no_name_contains_vllm(registry: CollectorRegistry, metrics: ServerMetrics) -> None:
    assert "vllm" not in generate_latest(registry).decode()
