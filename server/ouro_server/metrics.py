"""What the server adds to the `ouro_*` metrics: intent, thresholds in force, the controller,
audits and targets.

Depth by token, request, pass and step is counted in `ouro_runtime/metrics.py`, from the engine.
"""

import math
from collections.abc import Iterable, Mapping
from functools import partial

from prometheus_client import REGISTRY, CollectorRegistry

from ouro_server.audit.metrics import AuditMetrics, TargetMetrics
from ouro_server.defaults import Defaults
from ouro_server.metric_families import Families, origins


class ServerMetrics:
    """The server's part of the `ouro_*` metrics of one served model.

    Every label value is exported from the start. Registered after `DepthMetrics`, which forgets
    the metrics of an earlier server in the process, these included.

    Args:
        model_name: value of the label `model_name`, as vLLM's metrics carry it.
        loops: T.
        presets: the presets' names.
        classes: the priority classes' names; without any, one named "" stands for all requests.
        registry: where the metrics are registered.
    """

    def __init__(
        self,
        model_name: str,
        loops: int,
        presets: Iterable[str],
        classes: Iterable[str],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        make = Families(registry)
        counter, gauge = make.counter, make.gauge
        presets, classes = list(presets), list(classes)
        self.audits = AuditMetrics(model_name, presets, registry)
        self.targets = TargetMetrics(model_name, classes, registry)
        every = origins(presets)
        depths = range(1, loops + 1)
        requests = counter(
            "requests", "Finished HTTP generations, by what set their depth.", "source", "preset"
        )
        tokens = counter(
            "source_tokens",
            "Tokens of finished HTTP generations, by what set their depth and by read-out loop.",
            *("source", "preset", "depth"),
        )
        threshold = gauge(
            "exit_threshold",
            "Exit threshold in force for requests that set no depth.",
            "priority_class",
        )
        changes = counter(
            "controller_changes",
            "Times the latency controller raised (up) or lowered (down) the default thresholds.",
            "direction",
        )
        self._requests = {origin: requests.labels(model_name, *origin) for origin in every}
        self._tokens = {
            origin: {depth: tokens.labels(model_name, *origin, depth) for depth in depths}
            for origin in every
        }
        self._thresholds = {
            name: threshold.labels(model_name, name) for name in (*classes,) or ("",)
        }
        self._active, self._target, self._p95 = (
            gauge(f"controller_{name}", text).labels(model_name)
            for name, text in (
                ("active", "1 while the latency controller runs, else 0."),
                ("target_seconds", "The controller's target: p95 time per output token."),
                ("p95_seconds", "What the controller last read; NaN without tokens."),
            )
        )
        self._changes = {d: changes.labels(model_name, d) for d in ("up", "down")}
        self.show_reading(None)

    def count(self, source: str, preset: str | None, by_depth: Mapping[int, int]) -> None:
        """Count one finished generation and its tokens by depth."""
        origin = (source, preset or "")
        self._requests[origin].inc()
        for depth, tokens in by_depth.items():
            self._tokens[origin][depth].inc(tokens)

    def watch(self, defaults: Defaults) -> None:
        """From now on export the thresholds that `defaults` has in force, as of each scrape."""

        def threshold(name: str) -> float:
            return defaults.for_class(name).exit_threshold

        for name, gauge in self._thresholds.items():
            # Several API processes export values, not functions; there the defaults never change.
            gauge.set(threshold(name))
            gauge.set_function(partial(threshold, name))

    def show_controller(self, active: bool, target: float) -> None:
        """Whether the controller runs, and for what target in seconds."""
        self._active.set(active)
        self._target.set(target)

    def show_reading(self, p95: float | None) -> None:
        """What the controller read."""
        self._p95.set(math.nan if p95 is None else p95)

    def count_change(self, direction: str) -> None:
        """The thresholds went `up` or `down`."""
        self._changes[direction].inc()
