"""Seam: what vLLM's configuration becomes when the model is Ouro, and what is refused."""

from __future__ import annotations

import os
from typing import Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform

from ouro_runtime.checkpoint_config import check_config
from ouro_runtime.config import GATE, LoopConfig

SCHEDULER = "ouro_runtime.engine.cpu.scheduler.OuroScheduler"
CPU_WORKER = "ouro_runtime.engine.cpu.worker.OuroCPUWorker"


CUDA_SCHEDULER = "ouro_runtime.engine.cuda.scheduler.OuroAsyncScheduler"
CUDA_WORKER = "ouro_runtime.engine.cuda.runner.OuroGPUWorker"
CPU_BLOCK_SIZE = 32


NO_CONNECTORS = (
    "K/V transfer: connectors (offloading included) do not know pages by loop, nor which "
    "positions have K/V that may be shared"
)


NO_RAY = (
    "Ray on CPU: vLLM's CPU platform has no device that Ray could place. Leave out "
    "--distributed-executor-backend and --data-parallel-backend; several hosts go by "
    "--data-parallel-address and --headless"
)


def needs_ray(options: Any) -> bool:
    """Whether vLLM would run on Ray, by its configuration or the command line's options."""
    return "ray" in (options.distributed_executor_backend, options.data_parallel_backend)


def reads_loops() -> bool:
    """Whether the engine of this machine can read out, or compare, what each loop left."""
    return current_platform.is_cpu()


def runs_on_cpu(vllm_config: Any) -> bool:
    """Whether a looped model's engine is the CPU wing, however it is run: tests run the other one
    on CPU, too."""
    return vllm_config.scheduler_config.scheduler_cls == SCHEDULER


class UnsupportedError(ValueError):
    """A vLLM feature that the looped engine cannot honour: `feature: reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"Ouro Serve does not support {reason}")


class OuroConfigHook(VerifyAndUpdateConfig):
    """Called by vLLM when it has resolved the architecture."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        # Once more: hf_overrides came after the file was read.
        check_config(vllm_config.model_config.hf_config.to_dict(), "config.json and hf_overrides")
        LoopConfig.of(vllm_config)
        refuse(vllm_config)
        refuse_format(vllm_config)
        if current_platform.is_cuda():
            on_cuda(vllm_config)
            return
        scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
        scheduler.async_scheduling = False
        scheduler.scheduler_cls = SCHEDULER
        if current_platform.is_cpu():
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
            from ouro_runtime.engine.cpu import executor

            parallel.worker_cls = CPU_WORKER
            executor.choose(parallel)
            executor.install()
            cache = vllm_config.cache_config
            if cache.user_specified_block_size and cache.block_size % CPU_BLOCK_SIZE:
                raise ValueError(
                    f"--block-size must be a multiple of {CPU_BLOCK_SIZE} on CPU, "
                    f"got {cache.block_size}"
                )
            if not cache.user_specified_block_size:
                # vLLM's CPU kernels keep K transposed inside a block: the smaller the block, the
                # closer together the elements of one token, and the cheaper its stand-ins.
                cache.block_size = CPU_BLOCK_SIZE
                cache.user_specified_block_size = True


def refuse_format(vllm_config: Any) -> None:
    """Raise CheckpointError for a quantized checkpoint that vLLM has no kernel for on this CPU."""
    said = getattr(vllm_config.model_config.hf_config, "quantization_config", None)
    if said and current_platform.is_cpu():
        from ouro_runtime.model import quantized

        quantized.check_quantization(said, quantized.has_four_bits(), quantized.overflows())


def on_cuda(vllm_config: Any) -> None:
    """vLLM's V2 runner, our asynchronous scheduler, pages in the order our kernels read."""
    from vllm.config.compilation import CUDAGraphMode

    from ouro_runtime.engine.cuda.refuse import refuse as refuse_on_cuda

    refuse_on_cuda(vllm_config)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    vllm_config.scheduler_config.scheduler_cls = CUDA_SCHEDULER
    vllm_config.parallel_config.worker_cls = CUDA_WORKER
    vllm_config.cache_config.kv_cache_layout = "LBHNC"
    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or mode.has_full_cudagraphs():
        # A full graph of vLLM's would replay one forward; the graphs of a pass are our own.
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


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
        (current_platform.is_cpu() and needs_ray(parallel), NO_RAY),
        (
            vllm_config.speculative_config is not None,
            (
                "speculative decoding: a step already yields several tokens, and its slots would "
                "collide with the drafts'"
            ),
        ),
        (
            vllm_config.lora_config is not None and not current_platform.is_cpu(),
            "LoRA: only the CPU engine maps the rows of a pass to their adapters",
        ),
        (
            LoopConfig.of(vllm_config).defaults.exit_rule != GATE and not reads_loops(),
            (
                "exit rules other than gate: only the CPU engine reads what a loop left, or "
                "compares it with the loop before, between two passes"
            ),
        ),
        (
            vllm_config.lora_config is not None and vllm_config.lora_config.fully_sharded_loras,
            "--fully-sharded-loras: rows go through whole adapters, one after the other",
        ),
        (
            # vLLM makes a connector of the offloading options later than this.
            vllm_config.kv_transfer_config is not None or cache.kv_offloading_size is not None,
            NO_CONNECTORS,
        ),
        (
            parallel.decode_context_parallel_size > 1,
            "decode context parallelism: pages by loop are not sharded over positions",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            "prefill context parallelism: pages by loop are not sharded over positions",
        ),
        (
            parallel.enable_dbo,
            "dual-batch overlap: the passes of a step depend on each other",
        ),
        (
            current_platform.is_cpu() and scheduler.async_scheduling is True,
            "asynchronous scheduling: how many tokens a step yields is known only after it",
        ),
        (
            current_platform.is_cpu() and cache.cache_dtype.startswith("fp8"),
            (
                "fp8 K/V on CPU: stand-ins are moved as raw elements, whose places in a page are "
                "found by numbers that 8 bits do not hold"
            ),
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
            vllm_config.watermark_config is not None,
            "watermarks: tokens are sampled between the passes of a step, without them",
        ),
        (
            vllm_config.model_config.return_sampling_mask,
            "sampling masks: tokens are sampled between the passes of a step, which keep none",
        ),
        (
            vllm_config.model_config.enable_trace_replay,
            "trace replay: tokens are sampled between the passes of a step, not replayed",
        ),
        (
            vllm_config.model_config.runner_type == "pooling",
            "pooling: a looped model has one state per loop, and no pooling head was trained",
        ),
    ]
    for present, reason in reasons:
        if present:
            raise UnsupportedError(reason)


def install() -> None:
    """Make vLLM call the hook for Ouro models."""
    MODELS_CONFIG_MAP["OuroForCausalLM"] = OuroConfigHook
