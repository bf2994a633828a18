"""Stand-in K/V: the exit loop's K and V in the slots of the deeper loops (mode `skip`).

The layout of a page is the attention backend's own (vLLM's CPU kernels keep K transposed, or in
tiles). So the place of each element is found once by writing a known token to every offset of a
scratch page; after that a stand-in is a gather and a scatter of raw elements, whatever the layout.
"""

from collections.abc import Callable

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


class StandIn:
    """Copies of exit-loop K/V, all layers at once.

    Args:
        pages: [L, num_pages, kv_heads, page_elements], the cache of every layer.
        places: as `probe_layout` returns them. loops: T.
    """

    def __init__(self, pages: torch.Tensor, places: torch.Tensor, loops: int) -> None:
        self.pages = pages
        self.places = places
        self.loops = loops
        self._heads = torch.arange(pages.shape[2]).view(1, -1, 1)

    def fill(self, page: np.ndarray, offset: np.ndarray, depth: np.ndarray) -> None:
        """Fill loops depth + 1 .. T of cells.

        Args:
            page: [M] physical pages of the cells' exit loop. offset: [M] position in the page.
            depth: [M] exit loop, 1-based.
        """
        copies = self.loops - depth
        cell = np.repeat(np.arange(len(page)), copies)
        ahead = np.arange(len(cell)) - np.repeat(np.cumsum(copies) - copies, copies) + 1
        place = self.places[torch.from_numpy(offset)].unsqueeze(1)
        source = torch.from_numpy(page).view(-1, 1, 1)
        values = self.pages[:, source, self._heads, place]
        target = torch.from_numpy(page[cell] + ahead).view(-1, 1, 1)
        index = torch.from_numpy(cell)
        self.pages[:, target, self._heads, place[index]] = values[:, index]
