"""How the server's `ouro_*` metrics are made."""

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ouro_runtime.metrics import PREFIX
from ouro_server.resolve import SOURCES


class Families:
    """Makes metrics with the label `model_name`, and those in `by` after it.

    Args:
        registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, text: str, *by: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name", *by], registry=self._registry)

    def gauge(self, name: str, text: str, *by: str) -> Gauge:
        # Of several API processes the latest word counts; they all say the same.
        return Gauge(
            PREFIX + name,
            text,
            ["model_name", *by],
            registry=self._registry,
            multiprocess_mode="mostrecent",
        )

    def histogram(self, name: str, text: str, buckets: Sequence[float], *by: str) -> Histogram:
        labels = ["model_name", *by]
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self._registry)


def origins(presets: Iterable[str]) -> list[tuple[str, str]]:
    """Every (source, preset) that a request's depth may come from; "" is no preset."""
    named = [(source, p) for source in SOURCES if source != "default" for p in presets]
    return [("default", ""), ("request", ""), *named]
