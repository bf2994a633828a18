"""K/V caches by loop: what vLLM's allocator sees of a layer that every loop runs.

One cache per layer and loop; the caches of a loop are a group of vLLM's hybrid allocator, and its
groups take their blocks from one pool. Layer l of each group lies in the same memory, so a layer
sees one array of pages, whatever the loop, and the id of a block is the number of its page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as


@dataclass(frozen=True, kw_only=True)
class LoopSpec(FullAttentionSpec):
    """Pages of one loop; specs of other loops are other specs, so vLLM makes groups of them.

    Attributes:
        loop: from 0.
    """

    loop: int

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        if len({spec.loop for spec in specs}) != 1:
            raise AssertionError("caches of different loops are different groups")
        return replace_as(FullAttentionSpec.merge(list(specs)), cls, loop=specs[0].loop)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, LoopSpec) and spec.loop == self.loop
            for spec in kv_cache_specs.values()
        )


def spec_of(spec: KVCacheSpec | None, loop: int) -> LoopSpec:
    """`spec`, which an attention layer gave, as that of its cache of `loop`."""
    assert spec is not None and type(spec) is FullAttentionSpec, f"no pages by loop: {type(spec)}"
    assert spec.num_head_slots is None, "this backend packs its pages in a way of its own"
    return replace_as(spec, LoopSpec, loop=loop)


class LoopCache(AttentionLayerBase):
    """A cache and nothing else: that of one loop of an attention layer.

    vLLM finds it beside its layer, under a name of its own, and binds memory to it.
    """

    def __init__(self, layer: Attention, loop: int) -> None:
        self._layer, self._loop = layer, loop
        self.impl: Any = layer.impl
        self.num_heads = layer.num_heads
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self._layer.get_attn_backend()

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> LoopSpec:
        return spec_of(Attention.get_kv_cache_spec(self._layer, vllm_config), self._loop)

    def lies_on(self, pages: torch.Tensor) -> bool:
        """Whether this cache was bound to the memory that is `pages`."""
        mine = self.kv_cache
        return (mine.data_ptr(), mine.shape, mine.stride(), mine.dtype) == (
            pages.data_ptr(),
            pages.shape,
            pages.stride(),
            pages.dtype,
        )
