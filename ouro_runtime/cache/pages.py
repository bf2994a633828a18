"""Pages by loop: where the K and V of a cell lie.

A page holds the positions of one block at one loop. Each loop has a block table of its own, so
cells of mixed loops go through one attention call, each with the table of its loop.
"""

import numpy as np


class LoopPages:
    """A step's view of the block tables.

    Args:
        tables: [T, R, B] int32, by loop, the page of each request's n-th block. Not copied.
        block_size: positions a page holds.
    """

    def __init__(self, tables: np.ndarray, block_size: int) -> None:
        self.by_loop = tables
        self.block_size = block_size

    def planes(
        self, shared: np.ndarray, prompt: np.ndarray, pos: np.ndarray, loop: np.ndarray
    ) -> np.ndarray:
        """Whose loop's pages cells use, [N] int64, from 0: their own loop's, but the last one's for
        what is generated where all loops share them.

        Args:
            shared: [N] bool. prompt: [N] int64, tokens of the prompt.
        """
        return np.where(shared & (pos >= prompt), len(self.by_loop) - 1, loop)

    def slots(self, req: np.ndarray, pos: np.ndarray, loop: np.ndarray) -> np.ndarray:
        """Slot mapping [N] int64: where the K and V of cells (request index, position, 0-based
        loop) are written."""
        pages = self.by_loop[loop, req, pos // self.block_size].astype(np.int64)
        return pages * self.block_size + pos % self.block_size

    def tables(self, req: np.ndarray, loop: np.ndarray, positions: int) -> np.ndarray:
        """Block tables [S, ceil(positions / block_size)] int32 of S sequences."""
        width = -(-positions // self.block_size)
        return self.by_loop[loop, req, :width]
