"""`ouro_*` metrics against a private registry."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from ouro_runtime.engine.pin import SeamError
from ouro_runtime.engine.stat_logger import OuroStatLogger, listen
from ouro_runtime.metrics import DepthMetrics, depth_buckets, unregister
from ouro_runtime.reports import DepthReport, Finished, StepReport

MODEL = {"model_name": "m"}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, MODEL | labels)


def test_every_label_value_is_exported_from_the_start(registry: CollectorRegistry) -> None:
    DepthMetrics("m", 4, registry)
    for n in "1234":
        assert value(registry, "ouro_tokens_total", depth=n) == 0
        assert value(registry, "ouro_cells_total", loop=n) == 0
    for name in ("ouro_loops_run_total", "ouro_loops_skipped_total"):
        assert value(registry, name) == 0
    for name in ("ouro_request_mean_depth", "ouro_pass_rows", "ouro_step_tokens"):
        assert value(registry, f"{name}_count") == 0


def test_no_name_contains_vllm(registry: CollectorRegistry) -> None:
    DepthMetrics("m", 4, registry)
    assert "vllm" not in generate_latest(registry).decode()


def test_tokens_and_loops_are_counted(registry: CollectorRegistry) -> None:
    metrics = DepthMetrics("m", 4, registry)
    metrics.record(DepthReport([4, 1, 1, 2], [4, 1, 4, 2], [0, 0, 0, 0]))
    metrics.record(DepthReport([1], [1], [0]))
    counted = [value(registry, "ouro_tokens_total", depth=n) for n in "1234"]
    assert counted == [3, 1, 0, 1]
    run, skipped = (value(registry, f"ouro_loops_{k}_total") for k in ("run", "skipped"))
    assert (run, skipped) == (12, 8)
    assert run + skipped == 4 * sum(counted)


def test_finished_requests_are_observed_once_each(registry: CollectorRegistry) -> None:
    metrics = DepthMetrics("m", 4, registry)
    metrics.record(DepthReport(finished=[Finished(10, 4), Finished(4, 4), Finished(0, 0)]))
    assert value(registry, "ouro_request_mean_depth_count") == 2
    assert value(registry, "ouro_request_mean_depth_sum") == 3.5
    assert value(registry, "ouro_request_mean_depth_bucket", le="1.0") == 1
    assert value(registry, "ouro_request_mean_depth_bucket", le="2.5") == 2


def test_time_per_token_is_observed_by_mean_depth(registry: CollectorRegistry) -> None:
    metrics = DepthMetrics("m", 4, registry)
    name = "ouro_time_per_output_token_seconds"
    assert [value(registry, f"{name}_count", depth=n) for n in "1234"] == [0, 0, 0, 0]
    finished = [Finished(9, 4, 0.25), Finished(16, 4, 0.5), Finished(4, 1), Finished(0, 0)]
    metrics.record(DepthReport(finished=finished))
    assert [value(registry, f"{name}_count", depth=n) for n in "1234"] == [0, 1, 0, 1]
    assert value(registry, f"{name}_sum", depth="2") == 0.25
    assert value(registry, f"{name}_sum", depth="4") == 0.5


def test_steps_are_counted_by_pass_and_loop(registry: CollectorRegistry) -> None:
    metrics = DepthMetrics("m", 3, registry)
    step = StepReport([5, 3], rows_by_loop=[4, 3, 1], kv_pages=[3, 2, 2], tokens=4)
    metrics.record(DepthReport(steps=[step, step]))
    assert [value(registry, "ouro_cells_total", loop=n) for n in "123"] == [8, 6, 2]
    assert [value(registry, "ouro_kv_pages", loop=n) for n in "123"] == [3, 2, 2]
    assert value(registry, "ouro_pass_rows_count") == 4
    assert value(registry, "ouro_pass_rows_sum") == 16
    assert value(registry, "ouro_step_tokens_sum") == 8


def test_a_second_server_in_the_process_starts_anew(registry: CollectorRegistry) -> None:
    DepthMetrics("m", 4, registry).record(DepthReport([1], [1], [0]))
    DepthMetrics("m", 6, registry)
    assert value(registry, "ouro_tokens_total", depth="1") == 0
    assert value(registry, "ouro_tokens_total", depth="6") == 0


def vllm_config(architecture: str) -> SimpleNamespace:
    hf_config = SimpleNamespace(total_ut_steps=4)
    model = SimpleNamespace(architecture=architecture, hf_config=hf_config, served_model_name="m")
    return SimpleNamespace(model_config=model, additional_config={})


def test_the_stat_logger_hands_reports_on() -> None:
    logger = OuroStatLogger(vllm_config("OuroForCausalLM"), [0])
    try:
        logger.record(None, SimpleNamespace(ouro=DepthReport([2], [2], [0])))
        logger.record(None, SimpleNamespace(ouro=None))
        logger.record(None, SimpleNamespace())
        logger.record(None, None)
        assert value(REGISTRY, "ouro_tokens_total", depth="2") == 1
    finally:
        unregister(REGISTRY)


def test_who_listens_gets_every_report() -> None:
    logger = OuroStatLogger(vllm_config("OuroForCausalLM"), [0])
    report, heard = DepthReport([2], [2], [0]), []
    try:
        client = SimpleNamespace(logger_manager=SimpleNamespace(stat_loggers=[object(), logger]))
        listen(client, heard.append)
        logger.record(None, SimpleNamespace(ouro=report))
        logger.record(None, SimpleNamespace())
        assert heard == [report]
    finally:
        unregister(REGISTRY)


def test_nobody_can_listen_where_nothing_is_recorded() -> None:
    with pytest.raises(ValueError, match="--disable-log-stats"):
        listen(SimpleNamespace(logger_manager=None), print)
    with pytest.raises(SeamError):
        listen(SimpleNamespace(logger_manager=SimpleNamespace(stat_loggers=[])), print)


def test_the_stat_logger_is_silent_for_other_models() -> None:
    logger = OuroStatLogger(vllm_config("LlamaForCausalLM"), [0])
    logger.record(None, SimpleNamespace(ouro=DepthReport([2], [2], [0])))
    assert value(REGISTRY, "ouro_tokens_total", depth="2") is None


def test_depth_buckets_span_one_to_t() -> None:
    assert depth_buckets(1) == (1,)
    assert depth_buckets(2) == (1, 1.25, 1.5, 1.75, 2)


def test_drafts_are_counted_by_what_became_of_them() -> None:
    """Drafted at 2 and 1 and confirmed, at 3 and taken back with two behind it, and not drafted."""
    registry = CollectorRegistry()
    metrics = DepthMetrics("m", 4, registry)
    metrics.record(DepthReport([2, 1, 4, 4], [4, 4, 9, 4], [2, 1, 3, 0], drafts_dropped=2))
    counted = {
        outcome: registry.get_sample_value("ouro_drafts_total", {**MODEL, "outcome": outcome})
        for outcome in ("right", "wrong", "dropped")
    }
    assert counted == {"right": 2, "wrong": 1, "dropped": 2}
    assert registry.get_sample_value("ouro_loops_run_total", MODEL) == 21
    assert registry.get_sample_value("ouro_loops_skipped_total", MODEL) == 0
