"""Stand-in K/V: the exit loop's K and V in the slots of the deeper loops (mode `skip`).

The layout of a page is the attention backend's own (vLLM's CPU kernels keep K transposed, or in
tiles). So the place of each element is found once by writing a known token to every offset of a
scratch page; after that a stand-in moves raw elements, whatever the layout.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch

WriteToken = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def probe_layout(write: WriteToken, block_size: int, head_size: int, dtype: torch.dtype):
    """Where a token's K and V lie inside a page.

    Args:
        write: write(key, value, page, slot) stores key and value [1, 1, head_size] at slot [1] of
            page [1, 1, block_size, 2 * head_size].

    Returns:
        [block_size, 2 * head_size] int64: element offsets, K's then V's, of each position offset.

    Raises:
        RuntimeError: if the backend does not store every element once and unchanged.
    """
    page = torch.zeros(1, 1, block_size, 2 * head_size, dtype=dtype)
    ramp = torch.arange(1, head_size + 1, dtype=torch.float32).to(dtype).view(1, 1, -1)
    places = torch.empty(block_size, 2 * head_size, dtype=torch.int64)
    for offset in range(block_size):
        page.zero_()
        write(ramp, -ramp, page, torch.tensor([offset]))
        flat = page.flatten().float()
        found = flat.nonzero().flatten()
        values = flat[found].long()
        order = torch.where(values > 0, values - 1, head_size - 1 - values)
        if not torch.equal(order.sort().values, torch.arange(2 * head_size)):
            raise RuntimeError("the attention backend's cache layout cannot be addressed by token")
        places[offset, order] = found
    if len(places.unique()) != places.numel():
        raise RuntimeError("the attention backend's cache layout overlaps between tokens")
    return places


@numba.njit(nogil=True)
def _copy(pages, page, offset, depth, places, loops):  # pragma: no cover (compiled)
    """`StandIn.fill` on a numpy view of the pages; elements are moved, never interpreted."""
    held = np.empty(places.shape[1], pages.dtype)
    for layer in range(pages.shape[0]):
        for cell in range(page.shape[0]):
            where = places[offset[cell]]
            for head in range(pages.shape[2]):
                source = pages[layer, page[cell], head]
                for element in range(where.shape[0]):
                    held[element] = source[where[element]]
                for ahead in range(1, loops - depth[cell] + 1):
                    target = pages[layer, page[cell] + ahead, head]
                    for element in range(where.shape[0]):
                        target[where[element]] = held[element]


class StandIn:
    """Copies of exit-loop K/V, all layers at once.

    A compiled loop, not tensor indexing: K lies scattered over a page, and index tensors as large
    as what is moved made a fill twice as slow.

    Args:
        pages: [L, num_pages, kv_heads, page_elements], the cache of every layer, in memory order.
        places: as `probe_layout` returns them. loops: T.
    """

    def __init__(self, pages: torch.Tensor, places: torch.Tensor, loops: int) -> None:
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[pages.element_size()]
        self._pages = pages.view(integer).numpy()
        self._places = places.numpy()
        self._loops = loops
        none = np.zeros(0, np.int64)
        _copy(self._pages, none, none, none, self._places, loops)

    def fill(self, page: np.ndarray, offset: np.ndarray, depth: np.ndarray) -> None:
        """Fill loops depth + 1 .. T of cells.

        Args:
            page: [M] int64, physical pages of the cells' exit loop.
            offset: [M] int64, position in the page. depth: [M] int64, exit loop, 1-based.
        """
        _copy(self._pages, page, offset, depth, self._places, self._loops)
