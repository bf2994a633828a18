"""What a response says about depth: counting tokens, depths and loops."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

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
    loops_skipped: int = Field(
        description="Loops not executed there, token by token: T - the loops run for it, or none "
        "where positions dropped with a wrong draft made it more than T."
    )
    drafts_made: int = Field(default=0, description="Tokens drafted early, in `lossless`.")
    drafts_right: int = Field(
        default=0, description="Drafts that the last loop confirmed; the others were taken back."
    )
    source: Literal[SOURCES] = Field(  # type: ignore[valid-type]
        default="default",
        description="The strongest source that set a depth control of this request.",
    )
    preset: str | None = Field(
        default=None, description="Name of the preset that took part, if any."
    )


class TokenCounts(NamedTuple):
    """What the engine says of one generated token: the loop it was first known at, loops run for
    it, the loop it was drafted at (0: it was not), and drafts of later tokens dropped with it."""

    depth: int
    loops_run: int
    draft: int = 0
    dropped: int = 0


class DepthTally:
    """Running count of tokens by depth, for a model of `loops` loops."""

    def __init__(self, loops: int) -> None:
        self.loops = loops
        self.by_depth: Counter[int] = Counter()
        self.loops_run = self.loops_skipped = 0
        self.drafts_made = self.drafts_right = 0

    @property
    def tokens(self) -> int:
        return self.by_depth.total()

    def add(self, counts: Iterable[TokenCounts]) -> None:
        """Count tokens."""
        for token in counts:
            self.by_depth[token.depth] += 1
            self.loops_run += token.loops_run
            self.loops_skipped += max(0, self.loops - token.loops_run)
            self.drafts_made += (token.draft > 0) + token.dropped
            self.drafts_right += token.draft == token.depth

    def merge(self, other: "DepthTally") -> None:
        """Count what `other` counted."""
        self.by_depth.update(other.by_depth)
        for name in ("loops_run", "loops_skipped", "drafts_made", "drafts_right"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def usage(self, resolved: Resolved | None = None) -> DepthUsage:
        """The count as clients see it; `resolved` is None for a request that could set no depth."""
        tokens = self.tokens
        weighted = sum(depth * count for depth, count in self.by_depth.items())
        return DepthUsage(
            mean=weighted / tokens if tokens else None,
            histogram={str(d): self.by_depth[d] for d in range(1, self.loops + 1)},
            loops_run=self.loops_run,
            loops_skipped=self.loops_skipped,
            drafts_made=self.drafts_made,
            drafts_right=self.drafts_right,
            source=resolved.source if resolved else "default",
            preset=resolved.preset if resolved else None,
        )


def tokens_of(output: Any) -> list[TokenCounts]:
    """What a `CompletionOutput` says of its tokens, one entry per token.

    Raises:
        RuntimeError: when that is not aligned with its `token_ids`.
    """
    lists = (output.depths, output.loops_run, output.drafts, output.drafts_dropped)
    if any(len(values) != len(output.token_ids) for values in lists):
        raise RuntimeError(
            f"the engine reported {len(output.depths)} depths and {len(output.loops_run)} loop "
            f"counts for {len(output.token_ids)} tokens"
        )
    return [TokenCounts(*values) for values in zip(*lists, strict=True)]
