"""The test of an answer: one pass of every loop over prompt and answer together.

A greedy answer is that of full depth if and only if each of its tokens is the full-depth choice
given the tokens before it, and one pass tells that of all of them. Calibration and audits share it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ouro_runtime.config import GATE
from ouro_server.vllm_api import SamplingParams


def pass_params(loops: int | None = None, **more: Any) -> SamplingParams:
    """Sampling params of a prompt that is read at full depth for its log-probabilities.

    Args:
        loops: T, to say full depth explicitly; None leaves it to the engine's defaults. A prompt
            runs every loop in any case.
        more: further fields of vLLM's params.
    """
    if loops is not None:
        bounds = {"min_loops": 1, "max_loops": loops}
        off = {"exit_rule": GATE, "exit_threshold": 1.0, "exit_mode": "skip"}
        more["extra_args"] = {**bounds, **off}
    return SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, **more)


def chosen(answer: Sequence[int], logprobs: Iterable[Mapping[int, Any]]) -> list[bool]:
    """Whether each answer token is the full-depth choice.

    Args:
        logprobs: of each answer token's position, vLLM's `Logprob` by token id: the token's own and
            the likeliest one's.
    """
    return [
        # Of two likeliest tokens each is a choice.
        entry[token].logprob == max(value.logprob for value in entry.values())
        for token, entry in zip(answer, logprobs, strict=True)
    ]
