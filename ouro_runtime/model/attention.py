"""Attention whose cache page is T times as large: one module per layer serves every loop."""

from dataclasses import replace

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

ON_CPU = current_platform.is_cpu()
if ON_CPU:
    from ouro_runtime.model.cpu_attention import CellAttention


class LoopAttention(Attention):
    """vLLM's attention over loop-interleaved pages.

    vLLM allocates one logical block as T physical pages (`num_head_slots`); the layer sees its
    cache as `[num_blocks * T, kv_heads, block_size, 2 * head_size]`, so that page
    `block * T + loop` is an ordinary page to any backend whose pages are contiguous.

    Args:
        loops: T. Others as in `Attention`.
    """

    def __init__(self, *args, loops: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.loops = loops

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
        assert type(spec) is FullAttentionSpec, f"no loop-interleaved pages for {type(spec)}"
        assert spec.num_head_slots is None, "this backend packs its pages in a way of its own"
        return replace(spec, num_head_slots=self.loops * spec.num_kv_heads)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Args: kv_cache: [num_blocks, T * kv_heads, block_size, C], contiguous blocks."""
        blocks, slots, block_size, content = kv_cache.shape
        assert slots == self.loops * self.num_kv_heads, (slots, self.loops, self.num_kv_heads)
        assert kv_cache.stride()[1:] == (block_size * content, content, 1), kv_cache.stride()
        pages = kv_cache.view(blocks * self.loops, self.num_kv_heads, block_size, content)
        super().bind_kv_cache(pages)
        if ON_CPU:
            self.attend = CellAttention(self, pages)
