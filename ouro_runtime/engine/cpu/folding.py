"""Seam: pages of blocks that are folded (`cache/folding.py`), in the managers of vLLM's allocator.

The scheduler knows the depths of a request's positions when their tokens are out, and the worker
has what it then folds with the next step's plan, before it writes anywhere.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.block_pool import BlockPool

from ouro_runtime.cache.folding import BlockDepths, Fold
from ouro_runtime.engine.pin import check_parameters

check_parameters(BlockPool.touch, "blocks")
check_parameters(BlockPool.free_blocks, "ordered_blocks")
check_parameters(BlockPool.is_block_writable, "block")


class PageFolder:
    """Folds blocks of requests in `skip`.

    Args:
        managers: vLLM's, one for each loop, over one pool.
    """

    def __init__(self, managers: Any) -> None:
        self._managers = managers
        self._pool: BlockPool = managers[0].block_pool
        self._blocks: dict[str, BlockDepths] = {}
        self._folded: dict[str, list[Fold]] = {}

    def open(self, request_id: str, prompt: int, deepest: int) -> None:
        """A request whose positions leave at their depths for good."""
        if deepest > 1:
            size = self._managers[0].block_size
            self._blocks[request_id] = BlockDepths(prompt, size, deepest)

    def step(self, request_id: str, depths: list[int]) -> None:
        """Take in the depths of a step's tokens."""
        blocks = self._blocks.get(request_id)
        if blocks is not None:
            blocks.step(depths)

    def fold(self, request_id: str, computed: int, deepest: int) -> None:
        """Let the deeper pages of a running request go where its first `computed` positions do not
        need them."""
        blocks = self._blocks.get(request_id)
        if blocks is None or computed < blocks.next_end:
            return  # nearly always
        for block, depth in blocks.due(computed):
            kept = self._managers[depth - 1].req_to_blocks[request_id][block]
            freed = []
            for manager in self._managers[depth:deepest]:
                pages = manager.req_to_blocks[request_id]
                # What was read out early ends what may be shared of the deeper loops.
                assert self._pool.is_block_writable(pages[block]), "a shared page is folded"
                freed.append(pages[block])
                pages[block] = kept
            # Each entry of a table is a reference, which is given back when the request is freed.
            self._pool.touch([kept] * len(freed))
            self._pool.free_blocks(freed)
            self._folded.setdefault(request_id, []).append((block, depth))

    def free(self, request_id: str, finished: bool) -> None:
        """A request ended, or lost its pages."""
        self._folded.pop(request_id, None)
        if finished:
            self._blocks.pop(request_id, None)
        elif request_id in self._blocks:
            self._blocks[request_id].rewind()

    def take(self) -> dict[str, list[Fold]]:
        """By request, what was folded since the last call."""
        folded, self._folded = self._folded, {}
        return folded

    @property
    def idle(self) -> bool:
        """Nothing is left of any request."""
        return not self._blocks and not self._folded
