"""vLLM's V2 runner in plain torch, on CPU tensors: what it does around a `ModelState`.

Every method says which of the runner's it stands for. Kernels are written out; the order of calls,
and what is a host's number and what a device's, are the runner's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from ouro_runtime.engine.gpu_output import StepBill
from tests.gpu.fake_model import FakeModel, FakeRows


class FakeSampler:
    """Greedy, or by a random number that follows from seed and position; counts its calls.

    `penalized` requests never repeat a token of their own output (a stand-in for penalties, which
    makes the next token depend on those before it).
    """

    def __init__(self, slots: int, vocab: int, states: Any) -> None:
        self.req_states = states
        self.needs_logits_processing = np.zeros(slots, bool)
        self.penalties_state = SimpleNamespace(
            output_bin_counts=torch.zeros(slots, vocab, dtype=torch.int32),
            use_penalty=np.zeros(slots, bool),
        )
        words = SimpleNamespace(num_bad_words=SimpleNamespace(np=np.zeros(slots, np.int32)))
        self.logits_processors = [None, self.penalties_state, words]
        self.logprobs = np.zeros(slots, bool)
        self.seed: dict[int, int | None] = {}
        self.rows = 0

    def add_request(self, slot: int, params: Any) -> None:
        self.seed[slot] = params.seed
        self.logprobs[slot] = params.logprobs is not None
        self.penalties_state.use_penalty[slot] = params.presence_penalty != 0
        self.penalties_state.output_bin_counts[slot] = 0
        known = int(self.req_states.total_len.gpu[slot])
        for token in self.req_states.all_token_ids.gpu[slot, self.req_states.prompt[slot] : known]:
            self.penalties_state.output_bin_counts[slot, int(token)] += 1

    def get_logprobs_dims(self, slots: np.ndarray) -> tuple[int, int] | None:
        return (1, 0) if self.logprobs[slots].any() else None

    def __call__(self, logits: torch.Tensor, batch: Any) -> SamplerOutput:
        assert len(logits) == batch.num_reqs
        self.rows += len(logits)
        logits = logits.clone()
        raw = logits.log_softmax(-1)
        positions = batch.positions[batch.logits_indices]
        tokens = []
        for row, slot in enumerate(batch.idx_mapping_np.tolist()):
            if self.penalties_state.use_penalty[slot]:
                used = self.penalties_state.output_bin_counts[slot] > 0
                logits[row].masked_fill_(used, -torch.inf)
            seed = self.seed[slot]
            if seed is not None:
                generator = torch.Generator().manual_seed(seed * 1000 + int(positions[row]))
                noise = torch.empty(logits.shape[1]).exponential_(generator=generator)
                logits[row] -= noise.log()
            tokens.append(int(logits[row].argmax()))
        chosen = torch.tensor(tokens)
        top = raw.topk(1).indices
        ids = torch.cat([chosen[:, None], top], dim=1)
        return SamplerOutput(
            sampled_token_ids=chosen[:, None],
            logprobs_tensors=LogprobsTensors(ids, raw.gather(1, ids), torch.zeros_like(chosen))
            if self.get_logprobs_dims(batch.idx_mapping_np)
            else None,
            num_nans=None,
            num_sampled=None,
            num_rejected=None,
        )


class FakeRunner:
    """A worker of one process. `execute` is `execute_model` and `sample_tokens`."""

    def __init__(self, model: FakeModel, state: Any, slots: int, max_len: int, block: int) -> None:
        self.model, self.state, self.block = model, state, block
        self.slots: dict[str, int] = {}
        self.free = list(range(slots))
        vocab = model.config.vocab_size
        self.prompt, self.prefill = np.zeros(slots, np.int64), np.zeros(slots, np.int32)
        self.computed_np = np.zeros(slots, np.int32)
        self.computed = torch.zeros(slots, dtype=torch.int32)
        self.last = torch.zeros(slots, dtype=torch.int64)
        self.all_token_ids = torch.zeros(slots, max_len, dtype=torch.int32)
        self.total_len = torch.zeros(slots, dtype=torch.int32)
        self.table = torch.zeros(slots, -(-max_len // block), dtype=torch.int32)
        self.gathered = torch.zeros_like(self.table)
        self.held = np.zeros(slots, np.int64)
        states = SimpleNamespace(
            all_token_ids=SimpleNamespace(gpu=self.all_token_ids),
            total_len=SimpleNamespace(gpu=self.total_len),
            prompt=self.prompt,
        )
        self.inner = FakeSampler(slots, vocab, states)
        self.sampler, _ = state.custom_sampler(self.inner)
        group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=block))
        tables = SimpleNamespace(input_block_tables=[self.gathered])
        state.initialize_kv_cache(SimpleNamespace(kv_cache_groups=[group]), tables)
        state.rows = FakeRows(model, self.gathered)

    # ---- requests: finish_requests, add_requests, update_requests -------------------------------

    def _update(self, plan: Any) -> None:
        gone = plan.finished_req_ids | (plan.preempted_req_ids or set())
        for req_id in sorted(gone):
            self._remove(req_id)
        self.state.requests.forget(plan.finished_req_ids)
        for new in plan.scheduled_new_reqs:
            self._remove(new.req_id)
            slot = self.slots[new.req_id] = self.free.pop()
            known = len(new.prefill_token_ids)
            self.prompt[slot], self.prefill[slot] = new.prompt_len, known
            self.all_token_ids[slot, :known] = torch.tensor(new.prefill_token_ids)
            self.total_len[slot] = known
            self.computed[slot] = self.computed_np[slot] = new.num_computed_tokens
            self.state.add_request(slot, new)
            self.held[slot] = 0
            self._blocks(slot, new.block_ids)
            self.sampler.add_request(slot, new.sampling_params)
        old = plan.scheduled_cached_reqs
        for req_id, computed, blocks in zip(
            old.req_ids, old.num_computed_tokens, old.new_block_ids, strict=True
        ):
            self.computed_np[self.slots[req_id]] = computed
            if blocks is not None:
                self._blocks(self.slots[req_id], blocks)

    def _remove(self, req_id: str) -> None:
        self.state.remove_request(req_id)
        if req_id in self.slots:
            self.free.append(self.slots.pop(req_id))

    def _blocks(self, slot: int, blocks: tuple[list[int], ...]) -> None:
        held, new = int(self.held[slot]), blocks[0]
        self.table[slot, held : held + len(new)] = torch.tensor(new, dtype=torch.int32)
        self.held[slot] = held + len(new)

    # ---- prepare_inputs, prepare_attn ------------------------------------------------------------

    def _batch(self, plan: Any, pad: int) -> tuple[InputBatch, torch.Tensor]:
        scheduled = plan.num_scheduled_tokens
        names = sorted(scheduled, key=lambda name: (scheduled[name] != 1, scheduled[name]))
        count = np.array([scheduled[name] for name in names], np.int32)
        slots = np.array([self.slots[name] for name in names])
        index = torch.from_numpy(slots)
        requests, rows = len(names), int(count.sum())
        first = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
        owner = torch.repeat_interleave(torch.arange(requests), torch.from_numpy(count).long())
        offset = torch.arange(rows) - torch.from_numpy(first[:-1]).long()[owner]
        # The device's own positions: the host's are an upper bound.
        positions = self.computed[index][owner].long() + offset
        prefill = torch.from_numpy(self.prefill[slots]).long()[owner]
        known = self.all_token_ids[index][owner, positions].long()
        ids = torch.where(positions < prefill, known, self.last[index][owner])
        self.gathered[:requests] = self.table[index]
        # A position past the reserved slots would land in block 0, which nobody owns.
        blocks = self.gathered[owner, positions // self.block].long()
        logical = blocks * self.block + positions % self.block
        filled = np.minimum(self.computed_np[slots], self.prefill[slots])
        bound = self.computed_np[slots] + count
        assert (bound >= (self.computed[index].numpy() + count)).all(), (
            "the host's count fell behind"
        )
        numbers = torch.arange(requests + 1, dtype=torch.int32)
        batch = InputBatch(
            req_ids=names,
            num_reqs=requests,
            num_reqs_after_padding=requests,
            idx_mapping=index,
            idx_mapping_np=slots,
            expanded_idx_mapping=index,
            expanded_local_pos=torch.zeros(requests, dtype=torch.int32),
            num_scheduled_tokens=count,
            num_tokens=rows,
            num_tokens_after_padding=min(rows + pad, self.state.max_num_tokens),
            num_draft_tokens=0,
            num_draft_tokens_per_req=None,
            query_start_loc=torch.from_numpy(first),
            query_start_loc_np=first,
            seq_lens=(self.computed[index] + torch.from_numpy(count)).to(torch.int32),
            seq_lens_cpu_upper_bound=torch.from_numpy(bound),
            dcp_local_seq_lens=None,
            num_computed_tokens_np=self.computed_np[slots],
            prefill_len_np=self.prefill[slots],
            num_computed_prefill_tokens_np=filled,
            is_prefilling_np=filled < self.prefill[slots],
            has_prefill=bool((filled < self.prefill[slots]).any()),
            decode_graph_eligible=True,
            input_ids=ids,
            positions=positions,
            is_padding=torch.zeros(rows, dtype=torch.bool),
            logits_indices=torch.from_numpy(first[1:]).long() - 1,
            cu_num_logits=numbers,
            cu_num_logits_np=numbers.numpy(),
            has_structured_output_reqs=False,
            prompt_lens=None,
        )
        return batch, logical[None]

    # ---- execute_model, sample_tokens ------------------------------------------------------------

    def execute(self, plan: Any, pad: int = 0) -> tuple[ModelRunnerOutput, StepBill | None]:
        """One step: the output as it is when everything has come back, and its bill."""
        self._update(plan)
        if not plan.total_num_scheduled_tokens:
            return ModelRunnerOutput(req_ids=[], req_id_to_index={}), None
        batch, slot_mappings = self._batch(plan, pad)
        assert self.state.prepare_attn(batch, None, (self.gathered,), slot_mappings, [], None) == {}
        step = self.state.prepare_inputs(batch, None)["lane_step"]
        hidden = step.run()
        logits = self.model.compute_logits(hidden[batch.logits_indices])
        out = self.sampler(logits, batch)
        self._post_update(batch, out)
        bill = self.state.take_bill()
        return self._output(batch, out, bill), bill

    def _post_update(self, batch: InputBatch, out: SamplerOutput) -> None:
        counts = self.sampler.penalties_state.output_bin_counts
        for row, slot in enumerate(batch.idx_mapping_np.tolist()):
            amount = int(out.num_sampled[row])
            new = out.sampled_token_ids[row, :amount]
            total = int(self.total_len[slot])
            self.all_token_ids[slot, total : total + amount] = new.to(torch.int32)
            self.total_len[slot] += amount
            if amount:
                self.last[slot] = new[-1]
            if counts is not None:
                for token in new.tolist():
                    counts[slot, token] += 1
            self.computed[slot] += int(batch.num_scheduled_tokens[row] - out.num_rejected[row])

    def _output(self, batch: InputBatch, out: SamplerOutput, bill: StepBill) -> ModelRunnerOutput:
        amounts = out.num_sampled.tolist()
        tokens = [row[:n] for row, n in zip(out.sampled_token_ids.tolist(), amounts, strict=True)]
        result = ModelRunnerOutput(
            req_ids=batch.req_ids,
            req_id_to_index={name: i for i, name in enumerate(batch.req_ids)},
            sampled_token_ids=tokens,
            logprobs=None if out.logprobs_tensors is None else out.logprobs_tensors.tolists(),
        )
        result.ouro = bill.settle(bill.packed.numpy(), np.array(amounts))
        return result

    def came_back(self, bill: StepBill, result: ModelRunnerOutput) -> None:
        """`LaneOutput.get_output`'s last word."""
        self.state.note(bill, result.ouro)
