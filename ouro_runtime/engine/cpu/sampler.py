"""Seam: vLLM's sampler on some rows of the batch, between the passes of a step.

What the rows see of the batch's state is `cpu/row_state.py`'s business.
"""

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import _SAMPLING_EPS, Sampler

from ouro_runtime.config import LOSSLESS
from ouro_runtime.engine.cpu.row_state import is_idle, rows_of
from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.engine.requests import LoopRequest
from ouro_runtime.loop.greedy import argmax, largest

check_parameters(Sampler.gather_logprobs, "logprobs", "num_logprobs", "token_ids")
check_parameters(Sampler.__init__, "logprobs_mode", "use_fp64_gumbel")

place_of = attrgetter("position")


class SettledSampler(Sampler):
    """vLLM's, whose likeliest tokens do not depend on how many a neighbour asked for: a batch's
    `num_logprobs` is its requests' largest, and `torch.topk` breaks ties differently for each."""

    @staticmethod
    def gather_logprobs(
        logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor
    ) -> LogprobsTensors:
        own = Sampler.gather_logprobs(logprobs, 0, token_ids)
        values, ids = largest(logprobs, num_logprobs)
        return own._replace(
            logprob_token_ids=torch.cat((own.logprob_token_ids, ids.to(torch.int32)), dim=1),
            logprobs=torch.cat((own.logprobs, values), dim=1),
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
        and all(map(is_idle, metadata.logitsprocs.all))
        and (holder is None or not holder.has_tracked_requests())
    )


class StepSampler:
    """Samples row by row over the passes of one step, then hands vLLM one batch of tokens.

    Args:
        sampler: vLLM's sampler. metadata: the step's. outputs: per request, the list of its output
            tokens that penalties and min_tokens read; it grows during the step, but not in a batch
            that reads none (`is_bare_greedy`). Drafts are never in it.
        requests: what the worker remembers of each.
    """

    def __init__(
        self,
        sampler: Sampler,
        metadata: SamplingMetadata,
        outputs: list[list[int]],
        requests: Sequence[LoopRequest] = (),
    ) -> None:
        self.sampler = sampler
        self.metadata = metadata
        self.requests = requests
        # By row, tokens drafted and not confirmed yet, in order.
        self._drafted = {
            row: [c.draft for c in sorted(request.carried, key=place_of) if c.draft >= 0]
            for row, request in enumerate(requests)
            if request.params.exit_mode == LOSSLESS
        }
        self.outputs = outputs
        self._taken: list[tuple[np.ndarray, np.ndarray]] = []
        self._logprobs: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in outputs]
        self._stateful = [p for p in metadata.logitsprocs.all if not is_idle(p)]
        self._bare_greedy = is_bare_greedy(metadata)
        if not self._bare_greedy and self._drafted:
            self.metadata = replace(metadata, generators=self._generators())

    def _generators(self) -> dict[int, torch.Generator]:
        """vLLM's, and one for each lossless request that samples without a seed: its read-outs of a
        position must draw the same."""
        generators = dict(self.metadata.generators)
        temperature = self.metadata.temperature
        for row in self._drafted:
            draws = self.requests[row].draws
            if row in generators:
                draws.generator = generators[row]
            elif temperature is not None and temperature[row] >= _SAMPLING_EPS:
                if draws.generator is None:
                    draws.generator = torch.Generator()
                    draws.generator.manual_seed(int(torch.randint(0, 2**62, ())))
                generators[row] = draws.generator
        return generators

    def sample(self, rows: np.ndarray, logits: torch.Tensor) -> np.ndarray:
        """Sample `logits` [M, vocab] of batch indices `rows` [M]: tokens [M] int64."""
        if self._bare_greedy:
            tokens = argmax(logits)
            self._taken.append((rows, tokens))
            return tokens
        tokens = np.empty(len(rows), np.int64)
        ahead = {
            row: self.requests[row].draws.rewind()
            for row in rows.tolist()
            if self._drafted.get(row)
        }
        for places in self._alike(rows):
            part = logits if len(places) == len(rows) else logits[torch.from_numpy(places)]
            tokens[places] = self._sample_alike(rows[places], part)
        self._taken.append((rows, tokens))
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self.outputs[row].append(token)
            if row in ahead:
                waiting = self._drafted[row]
                right = waiting[0] == token
                self._drafted[row] = waiting[1:] if right else []
                self.requests[row].draws.confirm(ahead[row], right)
        for processor in self._stateful:
            processor.update_state(None)
        return tokens

    def draft(self, rows: np.ndarray, logits: torch.Tensor) -> np.ndarray:
        """What `sample` would give if all tokens drafted so far were confirmed, as far as that can
        be told: what vLLM counts of min_tokens is counted of confirmed tokens only. Nothing is
        handed over, and no log-probability computed."""
        if self._bare_greedy:
            return argmax(logits)
        metadata = rows_of(self.metadata, rows, len(self.outputs))
        metadata = replace(
            metadata,
            max_num_logprobs=None,
            logprob_token_ids=None,
            output_token_ids=metadata.output_token_ids
            and [self.outputs[row] + self._drafted[row] for row in rows.tolist()],
        )
        for row in rows.tolist():
            self.requests[row].draws.drafting()
        out = self.sampler(logits=logits, sampling_metadata=metadata)
        tokens = out.sampled_token_ids.view(-1).numpy().astype(np.int64)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self._drafted[row].append(token)
        return tokens

    def _alike(self, rows: np.ndarray) -> list[np.ndarray]:
        """Places of `rows` that may be sampled together.

        vLLM gives a batch's log-probabilities as one array: as soon as a request names the tokens
        it wants them of, all get as many columns, and those of others are no longer the likeliest.
        """
        named = self.metadata.logprob_token_ids
        if not named:
            return [np.arange(len(rows))]
        count = np.array([len(named.get(row, ())) for row in rows.tolist()])
        return [np.nonzero(count == number)[0] for number in np.unique(count)]

    def _sample_alike(self, rows: np.ndarray, logits: torch.Tensor) -> np.ndarray:
        batch, metadata = len(self.outputs), self.metadata
        if len(rows) != batch or not np.array_equal(rows, np.arange(batch)):
            metadata = rows_of(metadata, rows, batch)
        out = self.sampler(logits=logits, sampling_metadata=metadata)
        if out.logprobs_tensors is not None:
            for place, row in enumerate(rows.tolist()):
                self._logprobs[row].append(tuple(part[place] for part in out.logprobs_tensors[:3]))
        return out.sampled_token_ids.view(-1).numpy()

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
        """Row r's tokens from place r * width on; entries beyond those it asked for are no token's.

        vLLM's API process takes as many entries as a request asked for.
        """
        entries = [
            (row * width + place, entry)
            for row, held in enumerate(self._logprobs)
            for place, entry in enumerate(held)
        ]
        if not entries:
            return None
        places, columns = len(self._logprobs) * width, max(len(ids) for _, (ids, *_) in entries)
        ids = torch.zeros(places, columns, dtype=torch.int32)
        values = torch.full((places, columns), -torch.inf)
        ranks = torch.zeros(places, dtype=torch.int64)
        for at, (named, logprobs, rank) in entries:
            ids[at, : len(named)], values[at, : len(named)], ranks[at] = named, logprobs, rank
        return LogprobsTensors(ids, values, ranks)
