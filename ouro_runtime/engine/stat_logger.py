"""Seam (`vllm.stat_logger_plugins`): hands depth reports from vLLM's statistics to our metrics, and
to who listens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from ouro_runtime.config import LoopConfig
from ouro_runtime.engine.outputs import is_ouro
from ouro_runtime.engine.pin import SeamError
from ouro_runtime.metrics import DepthMetrics
from ouro_runtime.reports import DepthReport


class OuroStatLogger(AggregateStatLoggerBase):
    """One per API process, whatever the number of engines; silent for a model that is not Ouro."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self.metrics: DepthMetrics | None = None
        self.listener: Callable[[DepthReport], None] | None = None
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
            self.metrics.record(report, engine_idx)
            if self.listener is not None:
                self.listener(report)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def listen(engine_client: Any, listener: Callable[[DepthReport], None]) -> None:
    """Hand every depth report of an `AsyncLLM` to `listener`, on the event loop.

    Raises:
        ValueError: if vLLM keeps no statistics.
        SeamError: if the engine client has no logger of ours where this vLLM keeps them.
    """
    manager = engine_client.logger_manager
    if manager is None:
        raise ValueError("vLLM keeps no statistics under --disable-log-stats")
    own = [logger for logger in manager.stat_loggers if isinstance(logger, OuroStatLogger)]
    if len(own) != 1:
        raise SeamError(f"expected one OuroStatLogger on the engine client, found {len(own)}")
    own[0].listener = listener
