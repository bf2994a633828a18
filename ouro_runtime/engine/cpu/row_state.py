"""Seam: all that vLLM keeps per batch row for sampling, and what some of the rows see of it.

vLLM samples the whole batch once a step. Here a pass samples the rows that are read out, so what is
kept by row must be cut down to them: a field that is forgotten gives one request what another asked
for. Every field of vLLM's is in a table below, and one that it grows fails at import.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from ouro_runtime.engine.pin import SeamError
from ouro_runtime.engine.requests import LoopRequest


class _Subset:
    """Batch indices `rows` [M] of a batch of `batch` rows, and how each kind of state follows."""

    def __init__(self, rows: np.ndarray, batch: int) -> None:
        self.index, self.batch = torch.from_numpy(rows), batch
        self.listed = rows.tolist()

    def whole(self, value: Any) -> Any:
        """True of the batch, and so of its rows."""
        return value

    def tensor(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """One entry per row, or None."""
        return None if values is None else values[self.index]

    def lists(self, values: list) -> list:
        """One entry per row, or empty where nobody reads any."""
        return [values[row] for row in self.listed] if values else []

    def by_row(self, values: dict | None) -> dict | None:
        """Entries of the rows that have one."""
        if not values:
            return values
        return {new: values[old] for new, old in enumerate(self.listed) if old in values}

    def processors(self, values: LogitsProcessors) -> LogitsProcessors:
        """Stateful, by batch index: those with something to do see the rows in their places."""
        busy = [_OnRows(p, self.index, self.batch) for p in values.all if not is_idle(p)]
        return LogitsProcessors(busy)

    def budgets(self, holder: ThinkingBudgetStateHolder | None) -> Any:
        """A holder of the rows' states, which it shares with the batch's."""
        if holder is None:
            return None
        view = copy.copy(holder)
        view._state = self.by_row(holder._state) or {}
        view.cu_num_tokens = {}
        return view

    def nobody(self, _: Any) -> None:
        """Of a feature that `config_hook.refuse` keeps out."""


METADATA: dict[str, Callable[[_Subset, Any], Any]] = {
    "temperature": _Subset.tensor,
    "all_greedy": _Subset.whole,
    "all_random": _Subset.whole,
    "top_p": _Subset.tensor,
    "top_k": _Subset.tensor,
    "generators": _Subset.by_row,
    "max_num_logprobs": _Subset.whole,
    "no_penalties": _Subset.whole,
    "prompt_token_ids": _Subset.tensor,
    "frequency_penalties": _Subset.tensor,
    "presence_penalties": _Subset.tensor,
    "repetition_penalties": _Subset.tensor,
    "output_token_ids": _Subset.lists,
    "allowed_token_ids_mask": _Subset.tensor,
    "bad_words_token_ids": _Subset.by_row,
    "logitsprocs": _Subset.processors,
    "logprob_token_ids": _Subset.by_row,
    "spec_token_ids": _Subset.nobody,
    "thinking_budget_state_holder": _Subset.budgets,
}
"""How each field of vLLM's `SamplingMetadata` follows its rows."""

BUDGETS = {
    "by row": {"_state"},
    "scratch": {"cu_num_tokens"},
    "of the batch": {
        "device",
        "in_spec_mode",
        "is_enabled",
        "num_spec_tokens",
        "think_end_token_ids",
        "think_start_token_ids",
        "_mask_capacity",
    },
}
"""The attributes of vLLM's `ThinkingBudgetStateHolder`: `_Subset.budgets` maps the first two."""


def rows_of(metadata: SamplingMetadata, rows: np.ndarray, batch: int) -> SamplingMetadata:
    """The sampling metadata of batch indices `rows` [M] int64, in that order."""
    subset = _Subset(rows, batch)
    return SamplingMetadata(
        **{name: follow(subset, getattr(metadata, name)) for name, follow in METADATA.items()}
    )


def follow_budgets(
    metadata: SamplingMetadata, params: list[Any], requests: list[LoopRequest]
) -> None:
    """Make vLLM's thinking budgets those of the requests in the rows.

    vLLM 0.32 leaves a budget behind where a request without one moves into the row, which then has
    its thoughts ended for it. And it counts a budget over the steps, but begins anew from the
    prompt when a request comes back into the batch (after a preemption, or a step that had no room
    for it), so that its thoughts end too late.

    Args:
        params: `SamplingParams` of each row. requests: of each row; they keep their budgets.
    """
    holder = metadata.thinking_budget_state_holder
    if holder is None:
        return
    for row, state in list(holder._state.items()):
        if row >= len(params) or params[row].thinking_token_budget is None:
            del holder._state[row]
            continue
        request = requests[row]
        if request.budget is None:
            request.budget = state
        holder._state[row] = request.budget


def is_idle(processor: LogitsProcessor) -> bool:
    """Whether a built-in processor has nothing to do for any request; others count as busy."""
    if isinstance(processor, MinPLogitsProcessor):
        return not processor.min_p_count
    if isinstance(processor, LogitBiasLogitsProcessor):
        return not processor.biases
    if isinstance(processor, MinTokensLogitsProcessor):
        return not processor.min_toks
    return False


class _OnRows(LogitsProcessor):
    """A batch-wide logits processor applied to some rows."""

    def __init__(self, inner: LogitsProcessor, rows: torch.Tensor, batch: int) -> None:
        self.inner, self.rows, self.batch = inner, rows, batch

    def is_argmax_invariant(self) -> bool:
        return self.inner.is_argmax_invariant()

    def update_state(self, batch_update) -> None:
        raise AssertionError("a view of a logits processor has no state")

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        spread = logits.new_zeros(self.batch, logits.shape[1])
        spread[self.rows] = logits
        return self.inner.apply(spread)[self.rows]


def check_names(what: str, known: set[str], found: set[str]) -> None:
    """Raise SeamError unless vLLM's fields `found` are the `known` ones."""
    if known != found:
        raise SeamError(
            f"{what} of vLLM has other fields than the seam knows: "
            f"new {sorted(found - known)}, gone {sorted(known - found)}"
        )


check_names("SamplingMetadata", set(METADATA), {f.name for f in fields(SamplingMetadata)})
check_names(
    "ThinkingBudgetStateHolder",
    set.union(*BUDGETS.values()),
    set(vars(ThinkingBudgetStateHolder(None, 1, 0, torch.device("cpu"), False))),
)
