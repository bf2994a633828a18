"""Comparisons that name the first token that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tests.engine.cases import NEAR, Case

if TYPE_CHECKING:
    from tests.engine.harness import Output
    from tests.reference.model import Generation, Reference

LOGPROB_TOLERANCE = 1e-4
CDF_TOLERANCE = 1e-3


def first_difference(
    tokens: Sequence[int],
    depths: Sequence[int],
    expected_tokens: Sequence[int],
    expected_depths: Sequence[int],
) -> int | None:
    """Index of the first token, depth or missing entry that differs."""
    got = list(zip(tokens, depths, strict=True))
    expected = list(zip(expected_tokens, expected_depths, strict=True))
    for index, (left, right) in enumerate(zip(got, expected, strict=False)):
        if left != right:
            return index
    return None if len(got) == len(expected) else min(len(got), len(expected))


def describe(
    what: str,
    index: int,
    tokens: Sequence[int],
    depths: Sequence[int],
    expected_tokens: Sequence[int],
    expected_depths: Sequence[int],
) -> str:
    """One message: where the two differ, and both in full."""
    at = [
        f"token {t[index]} at depth {d[index]}" if index < len(t) else "nothing"
        for t, d in ((tokens, depths), (expected_tokens, expected_depths))
    ]
    return (
        f"{what}: token {index} differs: got {at[0]}, expected {at[1]}\n"
        f"  got      {list(tokens)}\n  depths   {list(depths)}\n"
        f"  expected {list(expected_tokens)}\n  depths   {list(expected_depths)}"
    )


def assert_same(
    what: str,
    tokens: Sequence[int],
    depths: Sequence[int],
    expected_tokens: Sequence[int],
    expected_depths: Sequence[int],
    margins: Sequence[float] | None = None,
) -> bool:
    """Tokens and depths agree; if `margins` says the first difference was a near tie, let it pass.

    Returns:
        Whether they agree in full (False: an excused near tie).
    """
    both = (tokens, depths, expected_tokens, expected_depths)
    index = first_difference(*both)
    if index is None:
        return True
    if margins is not None and index < len(margins) and margins[index] < NEAR:
        return False
    message = describe(what, index, *both)
    if margins is not None and index < len(margins):
        message += f"\n  margin of the expected token: {margins[index]:.2e}"
    raise AssertionError(message)


def assert_cdf(
    what: str, exit_cdf: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]
) -> None:
    """The gate's cumulative exit probabilities of each token agree, loop by loop."""
    for index, (got, want) in enumerate(zip(exit_cdf, expected, strict=True)):
        assert len(got) == len(want), f"{what}: token {index}: {got}, expected {want}"
        off = max(abs(a - b) for a, b in zip(got, want, strict=True))
        assert off <= CDF_TOLERANCE, f"{what}: exit CDF of token {index} is {got}, expected {want}"


def assert_case(
    case: Case, tokens: Sequence[int], depths: Sequence[int], logprobs: Sequence[float]
) -> None:
    """A golden case came out: tokens and depths exactly, log-probabilities within 1e-4.

    A case with a near tie may differ from some token on; what comes before must still agree.
    """
    margins = [case.margin] * len(case.tokens)
    same = assert_same(case.name, tokens, depths, case.tokens, case.depths, margins)
    end = len(tokens) if same else first_difference(tokens, depths, case.tokens, case.depths)
    for index in range(end or 0):
        off = abs(logprobs[index] - case.logprobs[index])
        assert off <= LOGPROB_TOLERANCE, (
            f"{case.name}: log-probability of token {index} is {logprobs[index]:.6f}, "
            f"expected {case.logprobs[index]:.6f}"
        )


def reference_run(
    reference: Reference,
    prompt: Sequence[int],
    depth: Mapping[str, Any],
    max_tokens: int,
    **options: Any,
) -> Generation:
    """What the released code generates with the depth controls of a request."""
    return reference.generate(
        prompt,
        max_tokens,
        threshold=depth.get("exit_threshold", 1.0),
        mode=depth.get("exit_mode", "skip"),
        forced_depths=depth.get("forced_depths"),
        **options,
    )


def same(what: str, out: Output, wanted: Generation) -> None:
    """Tokens and depths, as far as no decision was too close."""
    margins = [wanted.margin(index) for index in range(len(wanted.tokens))]
    assert_same(what, out.tokens, out.depths, wanted.tokens, wanted.depths, margins)
