"""The memory layout that the lane kernels were written for, against what vLLM would choose."""

import torch
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
from vllm.v1.kv_cache_layout import KVCacheLayout

from ouro_runtime.engine.cuda.block import kv_views

LAYOUT = "LBHNC"


def test_the_layout_is_one_that_backends_without_a_wish_take() -> None:
    assert KVCacheLayout[LAYOUT] in get_supported_kv_cache_layouts([])


def test_only_it_has_a_pages_heads_before_its_positions() -> None:
    layers, pages, heads, positions, content = 1, 3, 4, 4, 6
    shape = (layers, pages, heads, positions, content)
    for layout in (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC):
        order = layout.stride_order
        memory = torch.arange(3 * 4 * 4 * 6).view([shape[axis] for axis in order])
        cache = memory.permute([order.index(axis) for axis in range(5)])[0]
        dense = cache.stride()[1:] == (positions * content, content, 1)
        assert dense == (layout is KVCacheLayout[LAYOUT])


def test_k_and_v_are_views_of_a_page() -> None:
    cache = torch.arange(2 * 3 * 4 * 10).view(2, 3, 4, 10)
    key, value = kv_views(cache, 5, None)
    assert key.shape == value.shape == (2, 4, 3, 5)
    assert torch.equal(key[1, 2, 0], cache[1, 0, 2, :5])
    assert torch.equal(value[1, 2, 0], cache[1, 0, 2, 5:])
    assert key.data_ptr() == cache.data_ptr()
