"""Folded blocks (mode `skip`): where no position went past loop d, its page serves deeper loops.

The deeper pages of such a block hold stand-ins of what its positions left at d or before; and loop
d's page holds, or will hold before it is read, the same ones. So deeper entries of the block tables
may name loop d's page, and the deeper pages go back to the pool.

Loop d's page has them in time: a cell at a deeper loop was at loop d first, and what it reads of
loop d was paid then (`cache/standin.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Fold = tuple[int, int]
"""A block, and the loop d, from 1, that its deepest position ran."""


class BlockDepths:
    """The deepest loop in each block of one request's generated positions, as they become known.

    Token i, from 0, is read out at position `prompt + i - 1`, and leaves it at its depth. A block
    with a position of the prompt in it, which ran every loop, is never folded.

    Args:
        prompt: tokens of the prompt. block_size: positions of a block.
        deepest: the deepest loop that any position of the request runs.

    Attributes:
        next_end: `due` has nothing new before so many positions are done.
    """

    def __init__(self, prompt: int, block_size: int, deepest: int) -> None:
        self._block_size, self._deepest = block_size, deepest
        self._first, inside = divmod(prompt, block_size)
        # Depths of the block that is not full yet; at first that of the prompt's last position too.
        self._open: list[int] = []
        self._skip, self._need = 1, 1 + block_size - inside
        self._least = deepest if inside else 0
        self._full: list[int] = []
        self.rewind()

    def step(self, depths: Sequence[int]) -> None:
        """Take in the depths of the next tokens."""
        self._open += depths
        while len(self._open) >= self._need:
            self._full.append(max(self._least, *self._open[self._skip : self._need]))
            del self._open[: self._need]
            self._skip, self._need, self._least = 0, self._block_size, 0

    def rewind(self) -> None:
        """The request lost its pages."""
        self._next = self._first
        self.next_end = (self._next + 1) * self._block_size

    def due(self, computed: int) -> Iterator[Fold]:
        """Blocks to fold, each once until `rewind`.

        Args:
            computed: positions before this one are done, and nobody writes to them again.
        """
        end = min(computed // self._block_size, self._first + len(self._full))
        for block in range(self._next, end):
            depth = self._full[block - self._first]
            if depth < self._deepest:
                yield block, depth
        self._next = max(self._next, end)
        self.next_end = (self._next + 1) * self._block_size


def fold_tables(
    tables: Sequence[list[int]], rows: np.ndarray | None, deepest: int, folds: Sequence[Fold]
) -> None:
    """Fold blocks in what a worker knows of a request's pages.

    Args:
        tables: [deepest or more] lists: by loop, the page of each block.
        rows: [T, B] int32, the same in the batch's block tables, if the request is in the batch.
        deepest: the deepest loop that it holds pages of.
    """
    for block, depth in folds:
        page = tables[depth - 1][block]
        for table in tables[depth:deepest]:
            table[block] = page
        if rows is not None:
            rows[depth:deepest, block] = page
