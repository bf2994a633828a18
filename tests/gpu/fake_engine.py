"""The whole CUDA engine but for CUDA: the real scheduler and model state around a fake runner."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from ouro_runtime.engine import gpu_engine, gpu_state
from ouro_runtime.engine.gpu_scheduler import OuroAsyncScheduler
from ouro_runtime.engine.step_output import unpack_cdf
from ouro_runtime.plugin import register
from tests.gpu.fake_model import FakeModel
from tests.gpu.fake_runner import FakeRunner

BLOCK = 8


@dataclass
class Result:
    """One request's tokens, as clients see them; lists have one entry per token."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    loops_run: list[int] = field(default_factory=list)
    exit_cdf: list[list[float]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: Any = None


class FakeEngine:
    """Requests in, tokens and depths out.

    Args:
        folder: a golden checkpoint. in_flight: steps scheduled before the oldest is back (2 is
            asynchronous). blocks: of the K/V pool. budget: tokens of a step. buckets: lane counts
            that passes are padded to, as if they had been captured. pad: rows added to mixed
            passes. lanes: whether decode batches run the lane kernels.
    """

    def __init__(
        self,
        folder: str,
        *,
        in_flight: int = 2,
        blocks: int = 200,
        budget: int = 256,
        slots: int = 64,
        max_len: int = 160,
        buckets: tuple[int, ...] = (),
        pad: int = 0,
        lanes: bool = True,
        caching: bool = False,
    ) -> None:
        register()
        config = EngineArgs(
            model=folder,
            dtype="float32",
            skip_tokenizer_init=True,
            block_size=32,
            max_model_len=max_len,
            max_num_seqs=slots,
            max_num_batched_tokens=budget,
            enable_prefix_caching=caching,
            enforce_eager=True,
        ).create_engine_config()
        config.cache_config.block_size = BLOCK
        config.cache_config.num_gpu_blocks = blocks
        self.model = FakeModel(folder, blocks, BLOCK)
        c = self.model.config
        spec = FullAttentionSpec(
            block_size=BLOCK,
            num_kv_heads=c.num_key_value_heads,
            head_size=c.head_dim,
            dtype=torch.float32,
        )
        pool = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = OuroAsyncScheduler(
            config, pool, StructuredOutputManager(config), BLOCK, log_stats=True
        )
        self.scheduler.use_v2_model_runner = True
        with mock.patch.object(gpu_engine, "get_tensor_model_parallel_world_size", return_value=1):
            state = gpu_state.OuroModelState(config, self.model, None, torch.device("cpu"))
            self.model.lane_state = state
            self.runner = FakeRunner(self.model, state, slots, max_len, BLOCK)
        state.graphs.buckets = buckets
        if not lanes:
            state.engine.parts = None
        self.state, self.in_flight, self.pad = state, in_flight, pad
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256) if caching else None
        self.results: dict[str, Result] = {}
        self.reports: list[Any] = []
        self.preemptions = 0
        self._queue: deque[tuple[Any, Any, Any]] = deque()

    def add(self, name: str, prompt: Sequence[int], params: SamplingParams) -> None:
        request = Request(name, list(prompt), params, None, block_hasher=self.hasher)
        self.results[name] = Result()
        self.scheduler.add_request(request)

    def step(self) -> None:
        """`EngineCore.step_with_batch_queue`: schedule; take in the oldest step when enough are
        under way or nothing was scheduled."""
        plan = self.scheduler.schedule()
        self.preemptions += len(plan.preempted_req_ids or ())
        self._queue.append((plan, *self.runner.execute(plan, self.pad)))
        while len(self._queue) >= self.in_flight or (
            self._queue and not plan.total_num_scheduled_tokens
        ):
            self._take()

    def _take(self) -> None:
        plan, output, bill = self._queue.popleft()
        if bill is not None:
            self.runner.came_back(bill, output)
            self.reports.append(output.ouro.report)
        for outputs in self.scheduler.update_from_output(plan, output).values():
            for out in outputs.outputs:
                if out.request_id not in self.results:
                    continue
                result = self.results[out.request_id]
                result.tokens += out.new_token_ids
                if out.new_token_ids:
                    result.depths += out.routed_experts[:, 0].tolist()
                    result.loops_run += out.routed_experts[:, 1].tolist()
                    result.exit_cdf += unpack_cdf(out.routed_experts)
                if out.new_logprobs is not None:
                    result.logprobs += out.new_logprobs.logprobs[:, 0].tolist()
                result.reason = out.finish_reason or result.reason

    def run(self, most: int = 2000) -> dict[str, Result]:
        """Step until nothing is left."""
        for _ in range(most):
            if not (self.scheduler.has_unfinished_requests() or self._queue):
                return self.results
            self.step()
        raise AssertionError("the engine does not come to an end")

    def assert_idle(self) -> None:
        """Nothing is left of any request."""
        self.step()
        while self._queue:
            self._take()
        assert not self.scheduler.requests
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        for left in (self.scheduler._clean, self.scheduler._filled, self.scheduler._flight):
            assert not left, left
        requests = self.state.requests
        assert not requests._slot and not requests._depths and not requests._epoch


def params(max_tokens: int, depth: dict[str, Any] | None = None, **options: Any) -> SamplingParams:
    """Greedy, to the end of `max_tokens`, with log-probabilities."""
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "logprobs": 1,
        "extra_args": depth,
    }
    return SamplingParams(**(settings | options))
