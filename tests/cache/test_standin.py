"""Stand-in K/V, whatever the layout of a page."""

import numpy as np
import pytest
import torch

from ouro_runtime.cache.standin import StandIn, probe_layout

BLOCK, HEAD, HEADS, LOOPS, LAYERS, BLOCKS = 4, 8, 2, 4, 3, 5


def natural(key, value, page, slot):
    """K and V of a token side by side."""
    rows = page.view(-1, page.shape[1], BLOCK, 2 * HEAD)
    rows[slot // BLOCK, :, slot % BLOCK, :HEAD] = key
    rows[slot // BLOCK, :, slot % BLOCK, HEAD:] = value


def transposed(key, value, page, slot):
    """K as columns, then V as rows, as vLLM's CPU kernels do."""
    flat = page.view(-1, page.shape[1], BLOCK * 2 * HEAD)
    half = BLOCK * HEAD
    keys = flat[:, :, :half].unflatten(-1, (HEAD, BLOCK))
    values = flat[:, :, half:].unflatten(-1, (BLOCK, HEAD))
    keys[slot // BLOCK, :, :, slot % BLOCK] = key
    values[slot // BLOCK, :, slot % BLOCK] = value


@pytest.mark.parametrize("write", [natural, transposed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deeper_loops_read_the_exit_loop(write, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(LAYERS, BLOCKS * LOOPS, HEADS, BLOCK, 2 * HEAD, generator=generator)
    cache = cache.to(dtype)
    pages = cache.flatten(3)
    stand_in = StandIn(pages, probe_layout(write, BLOCK, HEAD, dtype), LOOPS)
    page, offset, depth = np.array([4, 14, 19]), np.array([1, 0, 3]), np.array([1, 3, 4])
    expected = pages.clone()
    for layer in range(LAYERS):
        probe = torch.arange(BLOCK * 2 * HEAD, dtype=torch.float32).view(1, 1, BLOCK, 2 * HEAD)
        for p, o, d in zip(page, offset, depth, strict=True):
            mine = torch.zeros_like(probe)
            ones = torch.ones(1, 1, HEAD)
            write(ones, ones, mine, torch.tensor([int(o)]))
            where = mine.flatten().bool()
            for deeper in range(1, LOOPS - d + 1):
                expected[layer, p + deeper][:, where] = expected[layer, p][:, where]
    stand_in.fill(page, offset, depth)
    assert torch.equal(pages, expected)


def test_a_layout_that_loses_elements_is_refused() -> None:
    def lossy(key, value, page, slot):
        natural(key * 0, value, page, slot)

    with pytest.raises(RuntimeError, match="layout"):
        probe_layout(lossy, BLOCK, HEAD, torch.float32)
