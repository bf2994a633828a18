"""Seam: what fits into the K/V pool, at the start and at the door.

vLLM starts only if its pool holds a request of `max_model_len`, which then is a request at every
loop. Here it need only hold one at a single loop, as `shared` or `max_loops: 1`; what a request can
reach follows from the loops that it holds. So a long one is refused only if it does not fit as what
it asks to be, and one that would outgrow the pool ends there, as at `max_model_len`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.v1.core import kv_cache_utils

from ouro_runtime.cache.room import longest
from ouro_runtime.config import SHARED, DepthError, LoopConfig
from ouro_runtime.engine.pin import SeamError, check_parameters
from ouro_runtime.engine.requests import deepest_loop_of

check = kv_cache_utils._check_enough_kv_cache_memory
check_parameters(check, "available_memory", "get_needed_memory", "estimate_max_model_len")
if "_check_enough_kv_cache_memory" not in kv_cache_utils.get_kv_cache_configs.__code__.co_names:
    raise SeamError("get_kv_cache_configs no longer calls _check_enough_kv_cache_memory")


def install() -> None:
    """Let vLLM's check at the start ask for room at one loop."""
    kv_cache_utils._check_enough_kv_cache_memory = check_one_loop


def check_one_loop(
    available_memory: int,
    get_needed_memory: Callable[[], int],
    max_model_len: int,
    estimate_max_model_len: Callable[[int], int],
) -> None:
    """vLLM's check, for the groups of loops; any other model's as it is."""
    from ouro_runtime.model.loop_cache import LoopSpec  # heavy; who asks has loaded a model

    groups = get_needed_memory.args[1] if isinstance(get_needed_memory, functools.partial) else []
    loops = sum(isinstance(group.kv_cache_spec, LoopSpec) for group in groups) or 1
    check(
        available_memory,
        lambda: get_needed_memory() // loops,
        max_model_len,
        lambda memory: estimate_max_model_len(memory * loops),
    )


def hold_to_pool(
    request: Any, config: LoopConfig, cache: Any, engines: int, max_model_len: int
) -> None:
    """Shorten `max_tokens` of vLLM's EngineCoreRequest to what the pool holds.

    Args:
        cache: vLLM's CacheConfig, with the pool's size once the engine has started.
        engines: that have a pool each, of the size that `cache` sums up.

    Raises:
        DepthError: if not even the prompt and a token fit.
    """
    sampling, prompt = request.sampling_params, request.prompt_token_ids
    if sampling is None or prompt is None or not cache.num_gpu_blocks:
        return
    params = config.request(sampling.extra_args)
    loops = deepest_loop_of(sampling, params, config.loops)
    planes = 1 if params.exit_mode == SHARED else loops
    # One page is vLLM's own; and slots are reserved for what a step may bring.
    pages = cache.num_gpu_blocks // engines - 1
    ahead = (2 if config.drafts else 1) * (config.loops - 1)
    reach = longest(pages, cache.block_size, len(prompt), loops, planes)
    if reach >= max_model_len:
        return  # no slot is reserved past the model's length
    room = reach - ahead - len(prompt)
    if room < 1:
        raise DepthError(
            "prompt",
            f"a prompt of {len(prompt)} tokens at {loops} loops does not fit into the K/V pool of "
            f"{pages} pages, each of {cache.block_size} positions at one loop",
        )
    if sampling.max_tokens is None or sampling.max_tokens > room:
        sampling.max_tokens = room
