"""Seam: what vLLM's configuration becomes when the model is Ouro, and what is refused."""

from __future__ import annotations

import os
from typing import Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform

from ouro_runtime.config import LoopConfig

SCHEDULER = "ouro_runtime.engine.scheduler.OuroScheduler"
CPU_WORKER = "ouro_runtime.engine.cpu_worker.OuroCPUWorker"


CPU_BLOCK_SIZE = 32


class UnsupportedError(ValueError):
    """A vLLM feature that the looped engine cannot honour."""


class OuroConfigHook(VerifyAndUpdateConfig):
    """Called by vLLM when it has resolved the architecture."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        LoopConfig.of(vllm_config)
        refuse(vllm_config)
        scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
        scheduler.async_scheduling = False
        scheduler.scheduler_cls = SCHEDULER
        if current_platform.is_cpu():
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
            parallel.worker_cls = CPU_WORKER
            if not vllm_config.cache_config.user_specified_block_size:
                # vLLM's CPU kernels keep K transposed inside a block: the smaller the block, the
                # closer together the elements of one token, and the cheaper its stand-ins.
                vllm_config.cache_config.block_size = CPU_BLOCK_SIZE
                vllm_config.cache_config.user_specified_block_size = True


def refuse(vllm_config: Any) -> None:
    """Raise UnsupportedError, with the reason, for the first feature that cannot work."""
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    cache = vllm_config.cache_config
    reasons = [
        (
            parallel.pipeline_parallel_size > 1,
            (
                "pipeline parallelism: every loop needs all layers, so a token would cross all "
                "stages once per loop; use tensor or data parallelism"
            ),
        ),
        (
            vllm_config.speculative_config is not None,
            (
                "speculative decoding: a step already yields several tokens, and its slots would "
                "collide with the drafts'"
            ),
        ),
        (
            vllm_config.lora_config is not None,
            "LoRA: the rows of a pass are not mapped to their adapters yet",
        ),
        (
            vllm_config.kv_transfer_config is not None,
            "K/V transfer: connectors do not know loop-interleaved pages",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            "decode context parallelism: loop-interleaved pages are not sharded over positions",
        ),
        (
            parallel.enable_dbo,
            "dual-batch overlap: the passes of a step depend on each other",
        ),
        (
            getattr(scheduler, "async_scheduling", None) is True,
            "asynchronous scheduling: how many tokens a step yields is known only after it",
        ),
        (
            cache.kv_sharing_fast_prefill,
            "kv-sharing fast prefill: every loop of a prompt position is needed",
        ),
        (
            vllm_config.model_config.enable_prompt_embeds,
            "prompt embeddings: not carried through the passes of a step",
        ),
        (
            vllm_config.model_config.runner_type == "pooling",
            "pooling: a looped model has one state per loop, and no pooling head was trained",
        ),
    ]
    for present, reason in reasons:
        if present:
            raise UnsupportedError(f"Ouro Serve does not support {reason}")


def install() -> None:
    """Make vLLM call the hook for Ouro models."""
    MODELS_CONFIG_MAP["OuroForCausalLM"] = OuroConfigHook
