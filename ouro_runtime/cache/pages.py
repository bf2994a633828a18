"""Loop-interleaved pages: loop t (0-based) of logical block b is physical page b * T + t.

So cells of mixed loops go through one attention call, each with a block table of its own.
"""

import numpy as np


class LoopPages:
    """A step's view of the logical block tables.

    Args:
        block_table: [R, B] int32, logical block of each request's n-th block. Not copied.
        block_size: positions a block holds.
        loops: T.
    """

    def __init__(self, block_table: np.ndarray, block_size: int, loops: int) -> None:
        self.block_table = block_table
        self.block_size = block_size
        self.loops = loops

    def pages(self, req: np.ndarray, pos: np.ndarray, loop: np.ndarray) -> np.ndarray:
        """Physical page [N] int64 of cells (request index, position, 0-based loop)."""
        blocks = self.block_table[req, pos // self.block_size].astype(np.int64)
        return blocks * self.loops + loop

    def slots(self, req: np.ndarray, pos: np.ndarray, loop: np.ndarray) -> np.ndarray:
        """Slot mapping [N] int64: where each cell's K and V are written."""
        return self.pages(req, pos, loop) * self.block_size + pos % self.block_size

    def tables(self, req: np.ndarray, loop: np.ndarray, positions: int) -> np.ndarray:
        """Physical block tables [S, ceil(positions / block_size)] int32 of S sequences."""
        width = -(-positions // self.block_size)
        return self.block_table[req, :width] * np.int32(self.loops) + loop[:, None].astype(np.int32)
