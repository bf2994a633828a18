"""Seam (`vllm.stat_logger_plugins`): hands depth reports from vLLM's statistics to our metrics."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from ouro_runtime.config import LoopConfig
from ouro_runtime.engine.outputs import is_ouro
from ouro_runtime.metrics import DepthMetrics


class OuroStatLogger(AggregateStatLoggerBase):
    """One per API process, whatever the number of engines; silent for a model that is not Ouro."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self.metrics: DepthMetrics | None = None
        if is_ouro(vllm_config):
            name = vllm_config.model_config.served_model_name
            self.metrics = DepthMetrics(name, LoopConfig.of(vllm_config).loops)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Count what `IterationStats.ouro` brings, if anything."""
        report = getattr(iteration_stats, "ouro", None)
        if self.metrics is not None and report is not None:
            self.metrics.record(report)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
