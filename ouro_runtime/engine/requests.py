"""What the worker remembers of a request between steps."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ouro_runtime.config import (
    DELTA,
    GATE,
    LOSSLESS,
    MARGIN,
    RETURN_LOOPS,
    SHARED,
    ExitParams,
    LoopConfig,
)
from ouro_runtime.engine.guesses import Guesses
from ouro_runtime.loop.draws import Draws
from ouro_runtime.loop.limits import deepest_loop, last_readout
from ouro_runtime.loop.rows import Carried, Work


def deepest_loop_of(sampling: Any, params: ExitParams, loops: int) -> int:
    """`deepest_loop` of vLLM's SamplingParams, the same for scheduler and worker."""
    asked = sampling.prompt_logprobs, sampling.prompt_logprob_token_ids
    return deepest_loop(params, loops, any(value is not None for value in asked))


@dataclass
class LoopRequest:
    """Depth controls, limits and unfinished rows of one request.

    Attributes:
        params: depth controls. stops: token ids that end the request.
        max_tokens: limit on generated tokens. prompt: prompt tokens.
        deepest: the deepest loop that any of its positions runs.
        single: one token per step (a grammar or a thinking budget needs the host in between).
        depths: depth of each token read out so far. carried: rows left over from the last step.
        slot: where the CPU runner accounts for its stand-ins (`cache/standin.py`).
        draws: the random numbers of its drafts (`cpu/sampler.py`).
        guesses: what each loop would have said, if the request asked (CPU).
        budget: what vLLM counts of its thoughts (`cpu/row_state.py`).
    """

    params: ExitParams
    stops: frozenset[int]
    max_tokens: int
    prompt: int
    single: bool
    deepest: int
    depths: list[int] = field(default_factory=list)
    carried: list[Carried] = field(default_factory=list)
    slot: int = -1
    draws: Draws = field(default_factory=Draws)
    guesses: Guesses | None = None
    budget: dict[str, Any] | None = None

    @classmethod
    def of(cls, sampling: Any, prompt: int, config: LoopConfig) -> "LoopRequest":
        """From vLLM's SamplingParams."""
        stops = set(sampling.stop_token_ids or ())
        if sampling.eos_token_id is not None:
            stops.add(sampling.eos_token_id)
        most = (sampling.extra_args or {}).get(RETURN_LOOPS)
        params = config.request(sampling.extra_args)
        return cls(
            guesses=None if most is None else Guesses(most, config.loops),
            params=params,
            deepest=deepest_loop_of(sampling, params, config.loops),
            stops=frozenset(stops),
            max_tokens=sampling.max_tokens,
            prompt=prompt,
            single=sampling.structured_outputs is not None
            or getattr(sampling, "thinking_token_budget", None) is not None,
        )

    @property
    def shared(self) -> bool:
        """Whether all that is generated has one K/V for all loops."""
        return self.params.exit_mode == SHARED

    @cached_property
    def _forced(self) -> np.ndarray | None:
        depths = self.params.forced_depths
        return np.array(depths) if depths else None

    def work(
        self, start: int, count: int, known: int, max_model_len: int, drafts: bool = False
    ) -> Work:
        """This request's part of a step; see `Work`.

        Args:
            drafts: whether drafts pay; a request that says itself where to draft is not asked.
        """
        params = self.params
        guided = params.guided and params.exit_mode == LOSSLESS
        return Work(
            start=start,
            count=count,
            known=known,
            prompt=self.prompt,
            last=last_readout(self.prompt, self.max_tokens, max_model_len),
            threshold=params.threshold_of(GATE),
            margin=1.0 if guided else params.threshold_of(MARGIN),
            delta=0.0 if guided else params.threshold_of(DELTA),
            min_loops=params.min_loops,
            max_loops=params.max_loops,
            deepest=self.deepest,
            forced=self._forced,
            exact=params.exit_mode == "exact",
            lossless=params.exit_mode == LOSSLESS,
            shared=self.shared,
            drafts=drafts or not params.guided,
            guided=guided,
            seat=self.slot,
            single=self.single,
            depths=self.depths,
            carried=self.carried,
        )
