"""Seam: what the schedulers of looped models share.

- `num_lookahead_tokens = T - 1` reserves the slots that a step may fill;
- the prefix cache gives a request that lost its blocks only what it would have offered itself; what
  it was to compute in the step that takes them away is withdrawn;
- K/V has no other way out: a connector is refused, however it was configured;
- depths ride to the API process in `EngineCoreOutput.routed_experts` (see `outputs.py`).
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request

from ouro_runtime.cache.sharing import CleanPrefix
from ouro_runtime.config import ExitParams, LoopConfig
from ouro_runtime.engine.config_hook import NO_CONNECTORS, UnsupportedError
from ouro_runtime.engine.outputs import pack_report
from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.engine.step_output import StepOutput
from ouro_runtime.reports import StepReport

check_parameters(KVCacheCoordinator.cache_blocks, "request", "num_computed_tokens")
check_parameters(Scheduler.update_from_output, "scheduler_output", "model_runner_output")
check_parameters(Scheduler._free_request_blocks, "request")
check_parameters(Scheduler._get_local_prefix_cache_hit, "request")
check_parameters(KVCacheManager.create_kv_cache_blocks, "blocks")
check_parameters(KVCacheManager.evict_blocks, "block_ids")
check_parameters(KVCacheManager.get_blocks, "request_id")


class LoopSchedulerMixin:
    """Comes before one of vLLM's schedulers among the bases of a class."""

    vllm_config: Any
    connector: Any
    kv_cache_manager: Any
    block_size: int
    log_stats: bool
    num_lookahead_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loop_config = LoopConfig.of(self.vllm_config)
        if self.connector is not None:
            raise UnsupportedError(NO_CONNECTORS)
        assert self.num_lookahead_tokens == 0, "another feature claims the lookahead slots"
        self.num_lookahead_tokens = self.loop_config.loops - 1
        self._clean: dict[str, CleanPrefix] = {}

    def _exit_params(self, request: Request) -> ExitParams:
        assert request.sampling_params is not None
        return self.loop_config.request(request.sampling_params.extra_args)

    def _clean_length(self, request: Request) -> int:
        """Leading positions of a request that have, or had, true K/V at every loop it needs."""
        raise NotImplementedError

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[Any, int, int, bool]:
        """What the prefix cache has of a request, never past its clean prefix.

        Others may have published blocks of the same tokens. To a request that was preempted they
        would bring true K/V where its tokens were made from stand-ins, and other tokens from there.
        """
        blocks, hit, *rest = super()._get_local_prefix_cache_hit(request)  # type: ignore[misc]
        limit = self._clean_length(request) // self.block_size
        if hit > limit * self.block_size:
            shorter = tuple(list(group[:limit]) for group in blocks.blocks)
            blocks = self.kv_cache_manager.create_kv_cache_blocks(shorter)
            hit = limit * self.block_size
        return blocks, hit, *rest

    def _advance_clean(self, request: Request, depths: list[int], written: int) -> None:
        """Take in the depths of a step's tokens.

        Args:
            written: positions of the request whose K/V the steps that have come back wrote.
        """
        clean = self._clean.get(request.request_id)
        if clean is None:
            mode = self._exit_params(request).exit_mode
            clean = CleanPrefix(request.num_prompt_tokens, self.loop_config.loops, mode)
            self._clean[request.request_id] = clean
        clean.step(depths)
        if self.kv_cache_manager.enable_caching and written > 0:
            clean_length = min(written, self._clean_length(request))
            self.kv_cache_manager.coordinator.cache_blocks(request, clean_length)

    def _add_depths(self, result: dict[int, EngineCoreOutputs], step: StepOutput) -> None:
        for outputs in result.values():
            for output in outputs.outputs:
                tokens = len(output.new_token_ids)
                if tokens:
                    output.routed_experts = step.notes[output.request_id][:tokens]

    def _send_report(self, result: dict[int, EngineCoreOutputs], report: StepReport) -> None:
        if not self.log_stats:
            return
        outputs = next(iter(result.values()), None)
        if outputs is None:
            outputs = result[0] = EngineCoreOutputs()
        outputs.outputs.append(pack_report(report))

    def _free_request_blocks(self, request: Request) -> None:
        # Also called on preemption: positions computed again keep their depths, so the clean
        # prefix of what was generated stays known for as long as the request lives.
        if request.is_finished():
            self._clean.pop(request.request_id, None)
        else:
            self._withdraw_planned(request)
        super()._free_request_blocks(request)  # type: ignore[misc]

    def _withdraw_planned(self, request: Request) -> None:
        """Take out of the prefix cache what a request that is preempted was only about to compute.

        vLLM publishes a block when the tokens that fill it are planned. By priority a request may
        lose its place in the very plan that has just given it tokens: they are not computed.
        """
        first = request.num_computed_tokens // self.block_size
        held = self.kv_cache_manager.get_blocks(request.request_id).blocks
        planned = {block.block_id for blocks in held for block in blocks[first:]}
        self.kv_cache_manager.evict_blocks(planned)


assert hasattr(EngineCoreOutput, "routed_experts"), "the depth channel is gone"
