"""Seam: vLLM's sampler on some rows of the batch, between the passes of a step.

vLLM samples the whole batch once a step. A step here samples the requests that are read out after
each pass, so the batch's sampling metadata is cut down to those rows. Stateful logits processors
address rows by batch index; while one is active its input is spread over the batch and gathered
back.
"""

from dataclasses import replace

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from ouro_runtime.loop.greedy import argmax


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


def _idle(processor: LogitsProcessor) -> bool:
    """Whether a built-in processor has nothing to do for any request; others count as busy."""
    if isinstance(processor, MinPLogitsProcessor):
        return not processor.min_p_count
    if isinstance(processor, LogitBiasLogitsProcessor):
        return not processor.biases
    if isinstance(processor, MinTokensLogitsProcessor):
        return not processor.min_toks
    return False


def rows_of(metadata: SamplingMetadata, rows: np.ndarray, batch: int) -> SamplingMetadata:
    """The sampling metadata of batch indices `rows` [M] int64, in that order."""
    index = torch.from_numpy(rows)
    listed = rows.tolist()

    def pick(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[index]

    def remap(by_row: dict | None) -> dict | None:
        if not by_row:
            return by_row
        return {new: by_row[old] for new, old in enumerate(listed) if old in by_row}

    busy = [p for p in metadata.logitsprocs.all if not _idle(p)]
    return replace(
        metadata,
        temperature=pick(metadata.temperature),
        top_p=pick(metadata.top_p),
        top_k=pick(metadata.top_k),
        generators=remap(metadata.generators),
        prompt_token_ids=pick(metadata.prompt_token_ids),
        frequency_penalties=pick(metadata.frequency_penalties),
        presence_penalties=pick(metadata.presence_penalties),
        repetition_penalties=pick(metadata.repetition_penalties),
        output_token_ids=[metadata.output_token_ids[i] for i in listed]
        if metadata.output_token_ids
        else [],
        allowed_token_ids_mask=pick(metadata.allowed_token_ids_mask),
        bad_words_token_ids=remap(metadata.bad_words_token_ids),
        logitsprocs=LogitsProcessors([_OnRows(p, index, batch) for p in busy]),
        logprob_token_ids=remap(metadata.logprob_token_ids),
    )


def is_bare_greedy(metadata: SamplingMetadata) -> bool:
    """Whether every token is the largest of its logits as they are, and no more is asked."""
    holder = metadata.thinking_budget_state_holder
    return (
        metadata.all_greedy
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.no_penalties
        and not metadata.bad_words_token_ids
        and metadata.allowed_token_ids_mask is None
        and all(map(_idle, metadata.logitsprocs.all))
        and (holder is None or not holder.has_tracked_requests())
    )


class StepSampler:
    """Samples row by row over the passes of one step, then hands vLLM one batch of tokens.

    Args:
        sampler: vLLM's sampler. metadata: the step's. outputs: per request, the list of its output
            tokens that penalties and min_tokens read; it grows during the step, but not in a batch
            that reads none (`is_bare_greedy`).
    """

    def __init__(
        self, sampler: Sampler, metadata: SamplingMetadata, outputs: list[list[int]]
    ) -> None:
        self.sampler = sampler
        self.metadata = metadata
        self.outputs = outputs
        self._taken: list[tuple[np.ndarray, np.ndarray]] = []
        self._logprobs: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in outputs]
        self._stateful = [p for p in metadata.logitsprocs.all if not _idle(p)]
        self._bare_greedy = is_bare_greedy(metadata)

    def sample(self, rows: np.ndarray, logits: torch.Tensor) -> np.ndarray:
        """Sample `logits` [M, vocab] of batch indices `rows` [M]: tokens [M] int64."""
        if self._bare_greedy:
            tokens = argmax(logits)
            self._taken.append((rows, tokens))
            return tokens
        batch = len(self.outputs)
        metadata = self.metadata
        if len(rows) != batch or not np.array_equal(rows, np.arange(batch)):
            metadata = rows_of(metadata, rows, batch)
        out = self.sampler(logits=logits, sampling_metadata=metadata)
        tokens = out.sampled_token_ids.view(-1).numpy().astype(np.int64)
        self._taken.append((rows, tokens))
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self.outputs[row].append(token)
        if out.logprobs_tensors is not None:
            for place, row in enumerate(rows.tolist()):
                self._logprobs[row].append(
                    tuple(part[place : place + 1] for part in out.logprobs_tensors[:3])
                )
        for processor in self._stateful:
            processor.update_state(None)
        return tokens

    def finish(self) -> tuple[torch.Tensor, LogprobsTensors | None]:
        """Tokens [R, W] int32 padded with -1, and the log-probabilities in the same places.

        Takes the step's tokens off `outputs` again: vLLM's bookkeeping adds them.
        """
        requests = len(self.outputs)
        rows, tokens = (
            np.concatenate([np.zeros(0, np.int64), *parts])
            for parts in (zip(*self._taken, strict=True) if self._taken else ((), ()))
        )
        count = np.bincount(rows, minlength=requests)
        width = max(2, int(count.max()))
        padded = np.full((requests, width), -1, np.int32)
        order = np.argsort(rows, kind="stable")
        place = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
        padded[rows[order], place] = tokens[order]
        if not self._bare_greedy:
            for taken, held in zip(count.tolist(), self.outputs, strict=True):
                del held[len(held) - taken :]
        return torch.from_numpy(padded), self._pad_logprobs(width)

    def _pad_logprobs(self, width: int) -> LogprobsTensors | None:
        first = next((entry for row in self._logprobs for entry in row), None)
        if first is None:
            return None
        parts = []
        for part, example in enumerate(first):
            if not example.numel():
                parts.append(example)
                continue
            full = example.new_zeros(len(self._logprobs) * width, *example.shape[1:])
            for row, entries in enumerate(self._logprobs):
                for place, entry in enumerate(entries):
                    full[row * width + place] = entry[part][0]
            parts.append(full)
        return LogprobsTensors(*parts)
