"""Seam: vLLM's V2 sampler on the lanes that may leave, between the passes of a step.

Every candidate lane is sampled, whether it leaves or not: who leaves is known on the device only.
That costs arithmetic and nothing else, since the sampler's random numbers follow from seed and
position, and its state changes when a token is committed. Tokens are committed here as they are
read out, where a later token of the same step may depend on it; before vLLM's own bookkeeping at
the end of the step, that is taken back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from ouro_runtime.engine.cuda.lanes import LaneBuffers, StepRecord


@dataclass
class History:
    """vLLM's per-request token history on the device, by request slot.

    Attributes:
        tokens: [S, max_model_len]. length: [S], prompt and output tokens.
        counts: [S, vocab], how often each token was put out (penalties).
    """

    tokens: torch.Tensor
    length: torch.Tensor
    counts: torch.Tensor

    def append(self, slots: torch.Tensor, read: torch.Tensor, tokens: torch.Tensor) -> None:
        """Token [M] of each slot [M] that was `read` [M]."""
        end = self.length[slots].long().clamp_max(self.tokens.shape[1] - 1)
        kept = self.tokens[slots, end]
        self.tokens[slots, end] = torch.where(read, tokens.to(kept.dtype), kept)
        self.length[slots] += read.to(self.length.dtype)
        self.counts[slots, tokens] += read.to(self.counts.dtype)

    def rewind(self, slots: torch.Tensor, count: torch.Tensor) -> None:
        """Forget the last `count` [R] tokens' lengths; vLLM appends them again."""
        self.length[slots] -= count.to(self.length.dtype)


class Logprobs:
    """Log-probabilities of a step, T places per request.

    Args:
        width: entries per token beside its own.
    """

    def __init__(self, lanes: int, loops: int, width: int, device: torch.device) -> None:
        self.lanes, self.loops = lanes, loops
        size = lanes * loops
        self.ids = torch.zeros(size, width + 1, dtype=torch.int64, device=device)
        self.values = torch.full((size, width + 1), -torch.inf, device=device)
        self.ranks = torch.zeros(size, dtype=torch.int64, device=device)

    def put(self, place: torch.Tensor, read: torch.Tensor, new: LogprobsTensors) -> None:
        """Entries `new` of M lanes at `place` [M], for those that were `read` [M]."""
        width = new.logprob_token_ids.shape[1]
        stores = (self.ids[:, :width], self.values[:, :width])
        for store, part in zip(stores, (new.logprob_token_ids, new.logprobs), strict=True):
            store[place] = torch.where(read[:, None], part.to(store.dtype), store[place])
        ranks = new.selected_token_ranks.to(self.ranks.dtype)
        self.ranks[place] = torch.where(read, ranks, self.ranks[place])

    def tensors(self) -> LogprobsTensors:
        """For vLLM: request r's tokens start at row r * T."""
        starts = [lane * self.loops for lane in range(self.lanes + 1)]
        return LogprobsTensors(self.ids, self.values, self.ranks, starts)


class StepSampling:
    """Sampling of one step.

    Args:
        sampler: vLLM's. batch: the step's `InputBatch`. loops: T.
        input_ids: [lanes] int64, the token at each lane's head; read when a lane is sampled.
        rows: [L], each lane's request in the batch; None: its own number.
    """

    def __init__(
        self,
        sampler: Any,
        batch: Any,
        loops: int,
        input_ids: torch.Tensor,
        rows: np.ndarray | None = None,
    ) -> None:
        self.sampler, self.batch, self.loops = sampler, batch, loops
        self.input_ids, self.rows = input_ids, rows
        device = batch.idx_mapping.device
        if rows is not None:
            self._rows = async_tensor_h2d(rows, device=device)
        dims = sampler.get_logprobs_dims(batch.idx_mapping_np)
        self.logprobs: Logprobs | None = None
        if dims is not None:
            self.logprobs = Logprobs(batch.num_reqs, loops, max(dims), device)
        self.history: History | None = None
        if remembers(sampler, batch.idx_mapping_np):
            states = sampler.req_states
            self.history = History(
                states.all_token_ids.gpu,
                states.total_len.gpu,
                sampler.penalties_state.output_bin_counts,
            )
        self._last: LogprobsTensors | None = None
        self.plain = dims is None and is_plain(sampler, batch.idx_mapping_np)

    def sample(
        self,
        lanes: torch.Tensor,
        lanes_np: np.ndarray,
        logits: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Tokens [M] int64 of `lanes` [M], whose heads are at `positions` [M]."""
        rows, rows_np = lanes, lanes_np
        if self.rows is not None:
            rows, rows_np = self._rows[lanes], self.rows[lanes_np]
        # A lane moves T - 1 positions in a step at most, and may begin as many behind the first.
        ahead = (self.loops - 1) * (1 if self.rows is None else 2)
        part = lane_batch(self.batch, rows, rows_np, positions, self.input_ids[lanes], ahead)
        output = self.sampler(logits, part)
        self._last = output.logprobs_tensors
        return output.sampled_token_ids.view(-1)

    def commit(
        self,
        requests: torch.Tensor,
        read: torch.Tensor,
        tokens: torch.Tensor,
        place: torch.Tensor,
        sampled: torch.Tensor | None = None,
    ) -> None:
        """Those of `requests` [M], none of them twice, that were `read` [M] took their tokens.

        Args:
            sampled: [M], which of the lanes just sampled each was; None: in their order.
        """
        if self.history is not None:
            self.history.append(self.batch.idx_mapping[requests], read, tokens)
        if self.logprobs is not None and self._last is not None:
            last = self._last
            if sampled is not None:
                last = LogprobsTensors(*(part[sampled] for part in last[:3]))
            self.logprobs.put(place, read, last)

    def output(self, record: StepRecord) -> SamplerOutput:
        """What vLLM's runner takes: 0..T tokens per request. Memory of its own.

        A decoding request was scheduled one position and moves by as many as it brought tokens:
        vLLM moves it by its scheduled positions less the "rejected" ones.
        """
        slots = self.batch.idx_mapping
        if self.history is not None:
            self.history.rewind(slots, record.count)
        return SamplerOutput(
            sampled_token_ids=record.tokens.clone(),
            logprobs_tensors=None if self.logprobs is None else self.logprobs.tensors(),
            num_nans=None,
            num_sampled=record.count.clone(),
            num_rejected=record.rejected.clone(),
        )

    @property
    def counted(self) -> bool:
        """Whether the penalties' counts already hold the step's tokens."""
        return self.history is not None


def remembers(sampler: Any, slots: np.ndarray) -> bool:
    """Whether the next token of one of `slots` depends on the tokens before it."""
    _, penalties, bad_words, *others = sampler.logits_processors
    return bool(
        penalties.use_penalty[slots].any()
        or bad_words.num_bad_words.np[slots].any()
        or (others and sampler.needs_logits_processing[slots].any())
    )


def is_plain(sampler: Any, slots: np.ndarray) -> bool:
    """Whether `sample_plain` is all that the sampler would do for `slots`, log-probabilities aside:
    each is greedy, or drawn at a temperature and nothing else."""
    if sampler.trace_replay_state is not None or sampler.return_sampling_mask:
        return False
    slots = slots[sampler.needs_logits_processing[slots]]
    if not len(slots):
        return True
    states, budgets = sampler.sampling_states, sampler.thinking_budget_state
    bias, penalties, bad_words, *others = sampler.logits_processors
    return not (
        others
        or bias.use_logit_bias[slots].any()
        or penalties.use_penalty[slots].any()
        or bad_words.num_bad_words.np[slots].any()
        or (budgets.enabled and budgets.use_thinking_budget[slots].any())
        or (states.min_p.np[slots] != 0.0).any()
        or (states.top_k.np[slots] != states.vocab_size).any()
        or (states.top_p.np[slots] != 1.0).any()
    )


def sample_plain(sampler: Any, buffers: LaneBuffers, logits: torch.Tensor) -> torch.Tensor:
    """Tokens [M] int64 of the first M lanes' logits [M, vocab], as vLLM's sampler draws them."""
    lanes = len(logits)
    return gumbel_sample(
        logits,
        buffers.numbers[:lanes],
        buffers.temperature,
        buffers.seed,
        buffers.positions[:lanes],
        apply_temperature=True,
        is_drafting=False,
        use_fp64=sampler.use_fp64_gumbel,
    )


def lane_batch(
    batch: Any,
    rows: torch.Tensor,
    rows_np: np.ndarray,
    positions: torch.Tensor,
    input_ids: torch.Tensor,
    ahead: int,
) -> Any:
    """The `InputBatch` of M lanes of the requests `rows` [M], one logits row each.

    Args:
        positions, input_ids: [M], of the lanes' heads. ahead: positions that a head may be after
            the one that its request was scheduled.
    """
    count = len(rows_np)
    numbers = torch.arange(count + 1, dtype=torch.int32, device=positions.device)
    slots = batch.idx_mapping[rows]
    bound = batch.seq_lens_cpu_upper_bound[torch.from_numpy(rows_np)] + ahead
    return replace(
        batch,
        req_ids=[batch.req_ids[row] for row in rows_np.tolist()],
        num_reqs=count,
        num_reqs_after_padding=count,
        idx_mapping=slots,
        idx_mapping_np=batch.idx_mapping_np[rows_np],
        expanded_idx_mapping=slots,
        expanded_local_pos=torch.zeros(count, dtype=torch.int32, device=positions.device),
        num_scheduled_tokens=np.ones(count, np.int32),
        num_tokens=count,
        num_tokens_after_padding=count,
        query_start_loc=numbers,
        query_start_loc_np=np.arange(count + 1, dtype=np.int32),
        seq_lens=(positions + 1).to(torch.int32),
        seq_lens_cpu_upper_bound=bound,
        input_ids=input_ids.to(torch.int32),
        positions=positions,
        logits_indices=numbers[:-1].long(),
        cu_num_logits=numbers,
        cu_num_logits_np=np.arange(count + 1, dtype=np.int32),
    )


class LaneSampler:
    """In the place of the runner's sampler: hands over what the step's passes sampled.

    Everything else is the wrapped sampler's, which also serves warm-up and profiling runs.

    Args:
        inner: vLLM's sampler. state: the model state; its `step_done(logits)` gives the output of
            the step that just ran, or None if there was none.
    """

    def __init__(self, inner: Any, state: Any) -> None:
        self._inner, self._state = inner, state
        self._counted = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, logits: torch.Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        done = self._state.step_done(logits)
        if done is None:
            self._counted = False
            return self._inner(logits, input_batch, *args, **kwargs)
        output, self._counted = done
        return output

    @property
    def penalties_state(self) -> Any:
        """The runner counts output tokens through this, unless the step counted them already."""
        if self._counted:
            return SimpleNamespace(output_bin_counts=None)
        return self._inner.penalties_state
