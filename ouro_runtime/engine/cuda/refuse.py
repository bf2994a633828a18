"""Seam: what only the CUDA engine refuses of vLLM's configuration.

Asked twice: by the configuration hook, and by the runner, since vLLM sets some of it after the
hook.
"""

from __future__ import annotations

from typing import Any

import vllm.envs as envs
from vllm.config.compilation import CUDAGraphMode

from ouro_runtime.engine.config_hook import UnsupportedError


def refuse(vllm_config: Any) -> None:
    """Raise UnsupportedError, with the reason, for the first feature that cannot work on CUDA."""
    mode = vllm_config.compilation_config.cudagraph_mode
    eager = vllm_config.model_config.enforce_eager or mode == CUDAGraphMode.NONE
    if envs.VLLM_BATCH_INVARIANT:
        raise UnsupportedError(
            "VLLM_BATCH_INVARIANT=1: how the lane kernels split a sum depends on how many requests "
            "share a step"
        )
    if envs.VLLM_USE_BREAKABLE_CUDAGRAPH and not eager:
        raise UnsupportedError(
            "VLLM_USE_BREAKABLE_CUDAGRAPH=1: vLLM would replay one captured pass in the place of a "
            "step's passes, and no token would ever come; unset it, or use --enforce-eager"
        )
