"""How long a request may become in a pool of pages of a loop each: plain arithmetic."""

from __future__ import annotations


def longest(pages: int, block_size: int, prompt: int, prompt_planes: int, planes: int) -> int:
    """Most positions of a request that has the pool for itself; less than its prompt if that does
    not fit. Also of one that was preempted, whose prompt is computed again.

    Args:
        pages: of the pool. block_size: positions a page holds.
        prompt: tokens of its prompt. prompt_planes: loops whose K/V of the prompt it holds.
        planes: loops whose K/V of all that is generated it holds, `prompt_planes` or fewer.
    """
    for_prompt = (prompt_planes - planes) * -(-prompt // block_size)
    return max(0, pages - for_prompt) // planes * block_size
