"""Attention over the pages of every loop: one module per layer serves them all."""

from dataclasses import replace

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from ouro_runtime.model.loop_cache import LoopCache, spec_of

ON_CPU = current_platform.is_cpu()
if ON_CPU:
    from ouro_runtime.model.cpu_attention import CellAttention


class LoopAttention(Attention):
    """vLLM's attention over pages of a loop each.

    On CPU a page is a block of vLLM's, of the group that is the loop's (`loop_cache.py`): this
    layer is the cache of loop 1, and those of the other loops are made beside it. On CUDA vLLM
    allocates one logical block as T physical pages (`num_head_slots`), and the layer sees its cache
    as `[num_blocks * T, kv_heads, block_size, 2 * head_size]`, where page `block * T + loop` is an
    ordinary page to any backend whose pages are contiguous.

    Args:
        loops: T. Others as in `Attention`.
    """

    def __init__(self, *args, loops: int, prefix: str, **kwargs) -> None:
        super().__init__(*args, prefix=prefix, **kwargs)
        self.loops = loops
        self._others: list[LoopCache] = []
        if ON_CPU:
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
        spec = super().get_kv_cache_spec(vllm_config)
        if ON_CPU:
            return spec_of(spec, 0)
        assert type(spec) is FullAttentionSpec, f"no loop-interleaved pages for {type(spec)}"
        assert spec.num_head_slots is None, "this backend packs its pages in a way of its own"
        return replace(spec, num_head_slots=self.loops * spec.num_kv_heads)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Args: kv_cache: [num_blocks, kv_heads (T * kv_heads on CUDA), block_size, C]."""
        blocks, slots, block_size, content = kv_cache.shape
        pages_of_block = 1 if ON_CPU else self.loops
        assert slots == pages_of_block * self.num_kv_heads, (slots, self.loops, self.num_kv_heads)
        assert kv_cache.stride()[1:] == (block_size * content, content, 1), kv_cache.stride()
        pages = kv_cache.view(blocks * pages_of_block, self.num_kv_heads, block_size, content)
        super().bind_kv_cache(pages)
        if ON_CPU:
            self.attend = CellAttention(self, pages)

    def check_pages(self) -> None:
        """Raise AssertionError unless the caches of every loop are one array of pages (on CPU)."""
        for cache in self._others:
            assert cache.lies_on(self.kv_cache), "caches of two loops lie apart"
