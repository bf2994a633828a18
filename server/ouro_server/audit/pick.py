"""Which requests are audited, and what can be told of their answers."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ouro_runtime.config import DEPTH_FIELDS, GATE, LOSSLESS, RULE, RULES, SHARED, THRESHOLD
from ouro_server.agreement import Agreement, Ticket
from ouro_server.audit.metrics import ALTERED
from ouro_server.defaults import Defaults
from ouro_server.resolve import FORCED, Resolved

GREEDY_BELOW = 1e-5
"""Temperatures under which vLLM takes the likeliest token (`_SAMPLING_EPS`)."""

ALTERING = (
    "allowed_token_ids",
    "bad_words",
    "frequency_penalty",
    "logit_bias",
    "min_tokens",
    "presence_penalty",
    "structured_outputs",
    "thinking_token_budget",
)
"""Fields of vLLM's sampling params that, unless empty or 0, have a say in which token is likeliest:
what a greedy answer would be at full depth cannot be told of plain log-probabilities then."""


@dataclass(frozen=True)
class Pick:
    """A request that is to be audited.

    Attributes:
        params: vLLM's sampling params that it shall run with.
        origin: (source, preset) of its depth.
        greedy: whether tokens are compared; else log-probabilities.
        true: it reads the K/V of every loop, so that an answer that ran every loop is that of full
            depth.
        adds_logprobs: whether those in its outputs are for the audit alone.
        ticket: what its verdict counts in, if it tries or watches a threshold.
    """

    params: Any
    origin: tuple[str, str]
    greedy: bool
    true: bool = True
    adds_logprobs: bool = False
    ticket: Ticket | None = None


class Picker:
    """Picks `share` of the requests that may skip loops, at random.

    Args:
        loops: T.
        defaults: the controls in force, for requests that try a threshold.
        agreement: the rule of the target agreement, if there is one.
        open_logits: whether processors of the operator's may change logits.
        raw: whether vLLM gives the log-probabilities of plain logits (`--logprobs-mode`).
    """

    def __init__(
        self,
        share: float,
        loops: int,
        defaults: Defaults,
        agreement: Agreement | None = None,
        open_logits: bool = False,
        raw: bool = True,
        rng: random.Random | None = None,
    ) -> None:
        self.share = share
        self.agreement = agreement
        self._loops = loops
        self._defaults = defaults
        self._open_logits = open_logits
        self._raw = raw
        self._rng = rng or random.Random()

    def pick(self, params: Any, resolved: Resolved | None) -> Pick | str | None:
        """Whether a request is audited, before it runs.

        Args:
            params: its sampling params, depth in `extra_args`; they are not changed.
            resolved: what its depth was resolved to; None if its endpoint knows none.

        Returns:
            The pick; or why a request that was drawn cannot be audited; or None if it was not
            drawn, or cannot skip.
        """
        if self._rng.random() >= self.share:
            return None
        source, preset = (resolved.source, resolved.preset or "") if resolved else ("default", "")
        greedy = params.temperature < GREEDY_BELOW
        fit = self._comparable(params, greedy)
        ticket = self._ticket(resolved) if greedy and fit else None
        if ticket is not None:
            params = self._at(params, ticket.threshold)
        if not self._may_skip(params.extra_args or {}):
            return None
        if not fit:
            return ALTERED
        adds = not greedy and params.logprobs is None
        if adds:
            params = params.clone()
            params.logprobs = 0  # of the sampled token alone
        mode = (params.extra_args or {}).get("exit_mode", self._defaults.base.exit_mode)
        return Pick(params, (source, preset), greedy, mode != SHARED, adds, ticket)

    def _comparable(self, params: Any, greedy: bool) -> bool:
        """Whether what was served can be held against full depth."""
        if params.logprob_token_ids is not None:
            return False
        if not greedy:
            return self._raw
        altered = params.repetition_penalty != 1 or any(getattr(params, f) for f in ALTERING)
        return not altered and not self._open_logits

    def _ticket(self, resolved: Resolved | None) -> Ticket | None:
        """What a request that sets no depth tries or watches."""
        if self.agreement is None or resolved is None or resolved.source != "default":
            return None
        name = resolved.priority_class
        return None if name is None else self.agreement.assign(name)

    def _at(self, params: Any, threshold: float) -> Any:
        """The same request at another default threshold."""
        params = params.clone()
        depth = self._defaults.at(threshold).settled(self._loops).controls()
        others = {k: v for k, v in (params.extra_args or {}).items() if k not in DEPTH_FIELDS}
        params.extra_args = {**others, **depth}
        return params

    def _may_skip(self, depth: Mapping[str, Any]) -> bool:
        if depth.get("exit_mode") == LOSSLESS:
            return False
        off = RULES[depth.get(RULE, GATE)][1]
        if depth.get("exit_mode") == SHARED:
            return True  # its answers are others even if it runs every loop
        whole = depth.get(THRESHOLD, off) == off and depth.get("max_loops") == self._loops
        return not whole or FORCED in depth
