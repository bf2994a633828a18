"""Attention over the pages of every loop: one module per layer serves them all."""

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheSpec

from ouro_runtime.model.loop_cache import LoopCache, spec_of

ON_CPU = current_platform.is_cpu()
if ON_CPU:
    from ouro_runtime.model.cpu_attention import CellAttention


class LoopAttention(Attention):
    """vLLM's attention over pages of a loop each.

    A page is a block of vLLM's, of the group that is the loop's (`loop_cache.py`): this layer is
    the cache of loop 1, and those of the other loops are made beside it. All of them lie in the
    same memory, `[num_pages, kv_heads, block_size, 2 * head_size]`: what loop a page is of, only
    block tables say.

    Args:
        loops: T. Others as in `Attention`.
    """

    def __init__(self, *args, loops: int, prefix: str, **kwargs) -> None:
        super().__init__(*args, prefix=prefix, **kwargs)
        self.loops = loops
        self._others: list[LoopCache] = []
        known = get_current_vllm_config().compilation_config.static_forward_context
        for loop in range(1, loops):
            known[f"{prefix}.loop{loop}"] = cache = LoopCache(self, loop)
            self._others.append(cache)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of N cells: [N, heads * head_size], K and V [N, kv_heads * head_size]."""
        if not ON_CPU:
            return super().forward(query, key, value)
        output = query.new_empty(query.shape)
        heads, size = (-1, self.num_heads, self.head_size), (-1, self.num_kv_heads, self.head_size)
        torch.ops.ouro.attend_cells(
            query.view(heads), key.view(size), value.view(size), output.view(heads), self.layer_name
        )
        return output

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        return spec_of(super().get_kv_cache_spec(vllm_config), 0)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Args: kv_cache: [num_pages, kv_heads, block_size, C]."""
        _, heads, block_size, content = kv_cache.shape
        assert heads == self.num_kv_heads, (heads, self.num_kv_heads)
        assert kv_cache.stride()[1:] == (block_size * content, content, 1), kv_cache.stride()
        super().bind_kv_cache(kv_cache)
        if ON_CPU:
            self.attend = CellAttention(self, kv_cache)

    def check_pages(self) -> None:
        """Raise AssertionError unless the caches of every loop are one array of pages."""
        for cache in self._others:
            assert cache.lies_on(self.kv_cache), "caches of two loops lie apart"
