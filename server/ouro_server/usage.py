"""What a response says about depth: counting tokens, depths and loops."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, Field

from ouro_server.resolve import SOURCES, Resolved


class DepthUsage(BaseModel):
    """`usage.depth`: at which loops the generated tokens were read out, and what they cost."""

    mean: float | None = Field(
        description="Mean depth of the generated tokens; null when there are none."
    )
    histogram: dict[str, int] = Field(
        description="Tokens per depth; one key for every loop, from 1 to T."
    )
    loops_run: int = Field(
        description="Loops executed at the positions that produced the generated tokens."
    )
    loops_skipped: int = Field(description="T x generated tokens - loops_run.")
    source: Literal[SOURCES] = Field(  # type: ignore[valid-type]
        default="default",
        description="The strongest source that set a depth control of this request.",
    )
    preset: str | None = Field(
        default=None, description="Name of the preset that took part, if any."
    )


class DepthTally:
    """Running count of tokens by depth, for a model of `loops` loops."""

    def __init__(self, loops: int) -> None:
        self.loops = loops
        self.by_depth: Counter[int] = Counter()
        self.loops_run = 0

    @property
    def tokens(self) -> int:
        return self.by_depth.total()

    def add(self, depths: Iterable[int], loops_run: Iterable[int]) -> None:
        """Count tokens read out at `depths` that cost `loops_run` loops."""
        self.by_depth.update(depths)
        self.loops_run += sum(loops_run)

    def merge(self, other: "DepthTally") -> None:
        """Count what `other` counted."""
        self.by_depth.update(other.by_depth)
        self.loops_run += other.loops_run

    def usage(self, resolved: Resolved | None = None) -> DepthUsage:
        """The count as clients see it; `resolved` is None for a request that could set no depth."""
        tokens = self.tokens
        weighted = sum(depth * count for depth, count in self.by_depth.items())
        return DepthUsage(
            mean=weighted / tokens if tokens else None,
            histogram={str(d): self.by_depth[d] for d in range(1, self.loops + 1)},
            loops_run=self.loops_run,
            loops_skipped=self.loops * tokens - self.loops_run,
            source=resolved.source if resolved else "default",
            preset=resolved.preset if resolved else None,
        )


def tokens_of(output: Any) -> tuple[list[int], list[int]]:
    """(depths, loops run) of a `CompletionOutput`, one entry per token.

    Raises:
        RuntimeError: when they are not aligned with its `token_ids`.
    """
    depths, loops_run = output.depths, output.loops_run
    if not len(depths) == len(loops_run) == len(output.token_ids):
        raise RuntimeError(
            f"the engine reported {len(depths)} depths and {len(loops_run)} loop counts "
            f"for {len(output.token_ids)} tokens"
        )
    return list(depths), list(loops_run)
