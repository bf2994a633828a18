"""Depth of the served model: one object on the app's state, for routes and handlers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ouro_runtime.config import GATE, RULES, LoopConfig
from ouro_server.defaults import Defaults
from ouro_server.metrics import ServerMetrics
from ouro_server.presets import PresetBook
from ouro_server.resolve import Resolved
from ouro_server.steering import Steering
from ouro_server.usage import DepthTally


@dataclass(frozen=True)
class ServedDepth:
    """Depth of one served model.

    Attributes:
        model: the name it is served under.
        loops: T.
        book: presets, efforts and priority classes.
        defaults: the controls in force for requests that set none.
        aliases: MODEL@PRESET -> preset, of the names that the model itself is served under.
        adapters: what is loaded by now, by name.
        loads: how often adapters were loaded, by name and folder.
        fixed: why the defaults must not be changed over HTTP; None if they may.
        metrics: where finished generations are counted, if anywhere.
        steering: what moves the defaults, if anything does.
        audit_share: of the requests that skip, how many are audited.
        drafts: whether lossless requests may be drafted.
        reads_loops: whether the engine can read out, or compare, what each loop left.
        known_xargs: whether all keys of `vllm_xargs` are known; not if the operator has logits
            processors that may read their own.
    """

    model: str
    loops: int
    book: PresetBook
    defaults: Defaults
    aliases: Mapping[str, str]
    fixed: tuple[int, str] | None = None
    metrics: ServerMetrics | None = None
    steering: Steering | None = None
    audit_share: float = 0.0
    drafts: bool = True
    reads_loops: bool = True
    known_xargs: bool = True
    adapters: Mapping[str, Any] = field(default_factory=dict)
    loads: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def rules(self) -> tuple[str, ...]:
        """The exit rules that the engine knows."""
        return tuple(RULES) if self.reads_loops else (GATE,)

    def alias(self, model: Any) -> tuple[str, str] | None:
        """(model, preset) of a NAME@PRESET: what vLLM is to be asked for, and what it means."""
        if not isinstance(model, str) or model in self.adapters:
            return None
        if model in self.aliases:
            return model, self.aliases[model]
        name, _, preset = model.rpartition("@")
        return (name, preset) if name in self.adapters and preset in self.book.presets else None

    def count(self, resolved: Resolved | None, tally: DepthTally) -> None:
        """Count a finished generation; `resolved` is None for one that could set no depth."""
        if self.metrics is not None:
            source, preset = (resolved.source, resolved.preset) if resolved else ("default", None)
            self.metrics.count(source, preset, tally.by_depth)

    @classmethod
    def of(
        cls,
        config: LoopConfig,
        book: PresetBook,
        names: Sequence[str],
        fixed: tuple[int, str] | None = None,
    ) -> "ServedDepth":
        """Of a model that is served under `names`, the first of which answers carry."""
        defaults = Defaults(config.defaults, config.loops)
        aliases = book.aliases(names)
        return cls(names[0], config.loops, book, defaults, aliases, fixed, drafts=config.drafts)
