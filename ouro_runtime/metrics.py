"""Depth in Prometheus: what tokens, requests, passes and steps cost in loops.

`ouro_runtime/engine/stat_logger.py` feeds this from vLLM's statistics;
vLLM's `/metrics` exports it.
"""

from collections.abc import Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from ouro_runtime.reports import DepthReport, Finished, StepReport

PREFIX = "ouro_"
DRAFT_OUTCOMES = ("right", "wrong", "dropped")
STEP_BUCKETS = tuple(2**i for i in range(14))
"""Rows of a pass and tokens of a step: 1, 2, 4 .. 8192."""
TIME_BUCKETS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0),
)
"""Seconds per token."""


def depth_buckets(loops: int) -> tuple[float, ...]:
    """Bucket bounds of a mean depth: quarters of a loop from 1 to `loops`."""
    return tuple(1 + i / 4 for i in range(4 * (loops - 1) + 1))


def unregister(registry: CollectorRegistry) -> None:
    """Forget the collectors of an earlier `DepthMetrics`, so that a process may start anew."""
    for collector in set(registry._names_to_collectors.values()):
        if getattr(collector, "_name", "").startswith(PREFIX):
            registry.unregister(collector)


class DepthMetrics:
    """The `ouro_*` metrics of one served model.

    Args:
        model_name: value of the label `model_name`, as vLLM's metrics carry it.
        loops: T. Every depth and loop from 1 to T is exported from the start.
        registry: where the metrics are registered; replaces those of an earlier `DepthMetrics`.
    """

    def __init__(self, model_name: str, loops: int, registry: CollectorRegistry = REGISTRY) -> None:
        unregister(registry)
        self.loops = loops
        numbers = [str(n) for n in range(1, loops + 1)]
        label = ["model_name"]

        def counter(name: str, text: str) -> Counter:
            return Counter(PREFIX + name, text, label, registry=registry).labels(model_name)

        def counters(
            name: str, text: str, by: str, values: Sequence[str] = numbers
        ) -> list[Counter]:
            family = Counter(PREFIX + name, text, [*label, by], registry=registry)
            return [family.labels(model_name, value) for value in values]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, label, buckets=buckets, registry=registry).labels(
                model_name
            )

        self.tokens = counters("tokens", "Generated tokens by read-out loop.", "depth")
        self.loops_run = counter(
            "loops_run", "Loops executed at the positions that produced the generated tokens."
        )
        self.loops_skipped = counter(
            "loops_skipped", "Loops not executed there: T less those run, token by token."
        )
        outcomes = counters(
            "drafts",
            "Tokens drafted early, by whether the last loop confirmed them, took them back, or was "
            "never run, for an earlier draft was taken back or the request ended.",
            "outcome",
            DRAFT_OUTCOMES,
        )
        self.drafts = dict(zip(DRAFT_OUTCOMES, outcomes, strict=True))
        self.mean_depth = histogram(
            "request_mean_depth", "Mean depth of a finished request's tokens.", depth_buckets(loops)
        )
        time_per_token = Histogram(
            PREFIX + "time_per_output_token_seconds",
            "A finished request's mean time per token after its first, by its mean depth.",
            [*label, "depth"],
            buckets=TIME_BUCKETS,
            registry=registry,
        )
        self.time_per_token = [time_per_token.labels(model_name, number) for number in numbers]
        pages = Gauge(
            PREFIX + "kv_pages",
            "K/V pages that requests hold, by loop; one that several share counts once.",
            [*label, "loop"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self.kv_pages = [pages.labels(model_name, number) for number in numbers]
        self._kv_pages: dict[int, list[int]] = {}
        self.cells = counters("cells", "Cells (one position at one loop) run, by loop.", "loop")
        self.pass_rows = histogram("pass_rows", "Cells in one pass.", STEP_BUCKETS)
        self.step_tokens = histogram(
            "step_tokens", "Tokens sampled in one engine step.", STEP_BUCKETS
        )

    def record(self, report: DepthReport, engine: int = 0) -> None:
        """Count what one iteration of an engine brought; pages are those of all engines."""
        for depth in report.depths:
            self.tokens[depth - 1].inc()
        loops_run = sum(report.loops_run)
        self.loops_run.inc(loops_run)
        self.loops_skipped.inc(sum(max(0, self.loops - run) for run in report.loops_run))
        drafted = [pair for pair in zip(report.drafts, report.depths, strict=True) if pair[0]]
        right = sum(draft == depth for draft, depth in drafted)
        self.drafts["right"].inc(right)
        self.drafts["wrong"].inc(len(drafted) - right)
        self.drafts["dropped"].inc(report.drafts_dropped)
        for request in report.finished:
            self._record_finished(request)
        for step in report.steps:
            self._record_step(step)
            if step.kv_pages:
                self._kv_pages[engine] = step.kv_pages
                held = zip(*self._kv_pages.values(), strict=True)
                for gauge, pages in zip(self.kv_pages, held, strict=True):
                    gauge.set(sum(pages))

    def _record_finished(self, request: Finished) -> None:
        if request.tokens == 0:
            return
        mean = request.depth_sum / request.tokens
        self.mean_depth.observe(mean)
        if request.seconds_per_token is not None:
            self.time_per_token[round(mean) - 1].observe(request.seconds_per_token)

    def _record_step(self, step: StepReport) -> None:
        for rows in step.pass_rows:
            self.pass_rows.observe(rows)
        for cells, rows in zip(self.cells, step.rows_by_loop, strict=False):
            cells.inc(rows)
        if step.pass_rows:
            self.step_tokens.observe(step.tokens)
