"""What audits and targets count."""

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry

from ouro_server.agreement import Agreement
from ouro_server.audit.verdict import Verdict
from ouro_server.metric_families import Families, origins

DIFFERENCES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Bucket bounds of a mean difference of log-probabilities, in nats."""

ALTERED, DROPPED, LONG, INTERRUPTED, FAILED = (
    "altered",
    "dropped",
    "long",
    "interrupted",
    "failed",
)
REASONS = (ALTERED, DROPPED, LONG, INTERRUPTED, FAILED)
"""Why a picked answer was not audited: penalties, a grammar and the like had a say in its tokens;
the queue was full; it fills the model's whole length, or at full depth does not fit into the K/V
pool; others came each time it was read; its pass failed, or its adapter was gone."""


class AuditMetrics:
    """Audits of one served model, by what set the depth of the audited request."""

    def __init__(self, model: str, presets: Iterable[str], registry: CollectorRegistry) -> None:
        make, by = Families(registry), ("source", "preset")
        requests, tokens = (
            make.counter(f"audited_{what}", f"Greedy {what} audited at full depth.", *by)
            for what in ("requests", "tokens")
        )
        agreeing_requests = make.counter(
            "agreeing_requests", "Audited answers that are those of full depth.", *by
        )
        agreeing_tokens = make.counter(
            "agreeing_tokens",
            "Audited tokens that are the full-depth choice given the tokens before them.",
            *by,
        )
        difference = make.histogram(
            "audit_logprob_difference",
            "Of audited sampled answers, the mean absolute difference of their tokens' "
            "log-probabilities, as served and at full depth.",
            DIFFERENCES,
            *by,
        )
        unaudited = make.counter(
            "unaudited_requests", "Requests picked for an audit that had none.", "reason"
        )
        every = origins(list(presets))
        families = (requests, agreeing_requests, tokens, agreeing_tokens)
        self._counters = {o: [f.labels(model, *o) for f in families] for o in every}
        self._differences = {o: difference.labels(model, *o) for o in every}
        self._unaudited = {reason: unaudited.labels(model, reason) for reason in REASONS}

    def count(self, origin: tuple[str, str], verdict: Verdict) -> None:
        """An audit of a request whose depth (source, preset) set."""
        if verdict.difference is not None:
            self._differences[origin].observe(verdict.difference)
            return
        added = (1, int(verdict.agrees), verdict.tokens, verdict.agreed)
        for counter, value in zip(self._counters[origin], added, strict=True):
            counter.inc(value)

    def skip(self, reason: str) -> None:
        """A picked answer is not audited."""
        self._unaudited[reason].inc()


class TargetMetrics:
    """What audits allow, and which target gives way."""

    TARGETS = ("latency", "agreement")

    def __init__(self, model: str, classes: Sequence[str], registry: CollectorRegistry) -> None:
        make = Families(registry)
        self._target = make.gauge(
            "agreement_target", "The share of answers that shall be those of full depth; 0: none."
        ).labels(model)
        threshold = make.gauge(
            "agreement_threshold",
            "The lowest default threshold that audits allow; NaN without a target agreement.",
            "priority_class",
        )
        gave_way = make.gauge(
            "target_gave_way", "1 while this target is missed for the other's sake.", "target"
        )
        trials = make.counter(
            "agreement_trials",
            "Tests of thresholds: proven, failed, or withdrawn after they had been proven.",
            "outcome",
        )
        self._thresholds = {name: threshold.labels(model, name) for name in classes or ("",)}
        self._gave_way = {name: gave_way.labels(model, name) for name in self.TARGETS}
        self._trials = {
            name: trials.labels(model, name) for name in ("proven", "failed", "withdrawn")
        }
        self._counted = dict.fromkeys(self._trials, 0)
        self.show((), None)

    def show(self, gave_way: Sequence[str], agreement: Agreement | None) -> None:
        """The state of the targets."""
        for name, gauge in self._gave_way.items():
            gauge.set(name in gave_way)
        self._target.set(agreement.rule.target if agreement else 0)
        for name, gauge in self._thresholds.items():
            gauge.set(agreement.proven(name) if agreement else float("nan"))
        for name, outcome in (agreement.outcomes if agreement else {}).items():
            self._trials[name].inc(outcome - self._counted[name])
            self._counted[name] = outcome
