"""Stand-in K/V: the exit loop's K and V in the slots of the deeper loops (mode `skip`).

A token that leaves early owes its deeper loops K/V, and the debt is paid when a cell of a later
position is about to read it, loop by loop, by each layer right before its attention; so nothing
depends on how the layers' caches lie in memory. A loop that nobody reaches again is never filled,
and positions side by side, which share cache lines, are filled together.

The layout of a page is the attention backend's own (vLLM's CPU kernels keep K transposed, or in
tiles). So the place of each element is found once by writing a known token to every offset of a
scratch page; after that a stand-in moves raw elements, whatever the layout. In a compiled loop, not
by tensor indexing: K lies scattered over a page, and index tensors would be larger than what is
moved.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch


def compiled(function: Callable) -> Callable:
    """`function`, compiled at its first call ever: later processes load it, where numba finds a
    folder to keep it in."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


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


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def raw(pages: torch.Tensor) -> np.ndarray:
    """A layer's cache [num_pages, kv_heads, block_size, 2 * head_size] as elements without meaning:
    [num_pages, kv_heads, page_elements], the same memory."""
    return pages.view(INTEGERS[pages.element_size()]).flatten(2).numpy()


@compiled
def fill(pages, places, debts):  # pragma: no cover (compiled)
    """Pay debts in one layer.

    Args:
        pages: as `raw` returns them. places: as `probe_layout` returns them.
        debts: as `StandIns.due` returns them.
    """
    for head in range(pages.shape[1]):
        for debt in range(debts.shape[0]):
            held = pages[debts[debt, 0], head]
            filling = pages[debts[debt, 1], head]
            where = places[debts[debt, 2]]
            for element in range(where.shape[0]):
                filling[where[element]] = held[where[element]]


@compiled
def _due(depths, filled, slot, loop, limit, tables, row, block_size):  # pragma: no cover
    """`StandIns.due`, compiled."""
    most = 0
    for s in range(slot.shape[0]):
        most += max(0, limit[s] - filled[slot[s], loop[s]])
    debts = np.empty((most, 3), np.int64)
    owed = 0
    for s in range(slot.shape[0]):
        done = filled[slot[s], loop[s]]
        for position in range(done, limit[s]):
            depth = depths[slot[s], position]
            if 0 < depth <= loop[s]:
                block = position // block_size
                held, filling = tables[depth - 1, row[s], block], tables[loop[s], row[s], block]
                if held != filling:  # one page in a folded block
                    debts[owed, 0] = held
                    debts[owed, 1] = filling
                    debts[owed, 2] = position % block_size
                    owed += 1
        filled[slot[s], loop[s]] = max(done, limit[s])
    return debts[:owed]


class StandIns:
    """What requests owe the deeper loops of their positions.

    Args:
        loops: T. positions: the longest request. block_size: positions a block holds.
    """

    def __init__(self, loops: int, positions: int, block_size: int) -> None:
        self._block_size = block_size
        # By request slot: the depth of positions in debt, else 0; how far each loop is paid.
        self._depths = np.zeros((1, positions), np.uint8)
        self._filled = np.zeros((1, loops), np.int64)
        self._free = [0]
        none = np.zeros(0, np.int64)
        self.due(none, none, none, np.zeros((loops, 0, 1), np.int32), none)  # compiles

    def open(self, prompt: int) -> int:
        """A slot for a request whose `prompt` positions will owe nothing."""
        if not self._free:
            held = len(self._depths)
            self._depths = np.concatenate([self._depths, np.zeros_like(self._depths)])
            self._filled = np.concatenate([self._filled, np.zeros_like(self._filled)])
            self._free = list(range(2 * held - 1, held - 1, -1))
        slot = self._free.pop()
        self._depths[slot] = 0
        self.rewind(slot, prompt)
        return slot

    def rewind(self, slot: int, true: int) -> None:
        """The request's K/V will be computed again from position `true` on; what is before it has
        K/V of its own at every loop, and owes nothing."""
        self._filled[slot] = true

    def close(self, slot: int) -> None:
        """The request ended."""
        self._free.append(slot)

    def owe(self, slot: np.ndarray, pos: np.ndarray, depth: np.ndarray) -> None:
        """Positions [M] of request slots [M] left at `depth` [M], 1-based."""
        self._depths[slot, pos] = depth

    def due(
        self,
        slot: np.ndarray,
        loop: np.ndarray,
        limit: np.ndarray,
        tables: np.ndarray,
        row: np.ndarray,
    ) -> np.ndarray:
        """What must be filled before cells run, and counts as paid from now on.

        Args:
            slot: [S] int64, request slots. loop: [S] int64, 0-based, the loop the cells run.
            limit: [S] int64, positions before this one are read.
            tables: [T, R, B] int32, pages by loop. row: [S] int64, the requests' rows of them.

        Returns:
            [D, 3] int64: the page that holds a position's K/V, the page to fill, and the position's
            offset in both. The same for every layer.
        """
        return _due(
            self._depths,
            self._filled,
            slot,
            loop,
            limit,
            tables,
            row,
            self._block_size,
        )
