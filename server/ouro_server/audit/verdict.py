"""What an audit says of an answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ouro_server.choices import chosen


@dataclass(frozen=True)
class Verdict:
    """Of one answer.

    Attributes:
        tokens: of the answer.
        agreed: of a greedy one, those that are the full-depth choice.
        difference: of a sampled one, the mean absolute difference between its tokens'
            log-probabilities as served and at full depth, in nats; None of a greedy one.
    """

    tokens: int
    agreed: int = 0
    difference: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether a greedy answer is that of full depth."""
        return self.agreed == self.tokens


def judge(
    answer: Sequence[int],
    logprobs: Sequence[Mapping[int, Any]],
    served: Sequence[float] | None,
) -> Verdict:
    """The verdict on an answer.

    Args:
        logprobs: of its tokens at full depth: vLLM's `Logprob` by token id, the token's own and the
            likeliest one's.
        served: the log-probabilities that it was sampled at, before temperature and the like; None
            for a greedy answer.
    """
    if served is None:
        return Verdict(len(answer), sum(chosen(answer, logprobs)))
    full = [entry[token].logprob for token, entry in zip(answer, logprobs, strict=True)]
    apart = [abs(a - b) for a, b in zip(full, served, strict=True)]
    return Verdict(len(answer), difference=sum(apart) / len(apart))
