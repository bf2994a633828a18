"""Notes the tokens of picked requests on their way to the client."""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ouro_server.audit.auditor import Answer, Auditor
from ouro_server.audit.pick import Pick, Picker
from ouro_server.honest_status import progress_of_request
from ouro_server.vllm_api import RequestOutputKind

FINISHED = ("stop", "length", "repetition")
"""vLLM's finish reasons of answers that are whole."""

logger = logging.getLogger(__name__)


@dataclass
class Notes:
    """What the first choice of a picked request has been given so far."""

    pick: Pick
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    served: list[float] = field(default_factory=list)
    finished: bool = False

    def hear(self, result: Any) -> None:
        """Note an output of the engine's, and take out of it what nobody but the audit asked for.

        Raises:
            Exception: whatever an output that is not understood leads to; it is as it should be.
        """
        adds = self.pick.adds_logprobs
        said = [output.logprobs for output in result.outputs]
        for output in result.outputs if adds else ():
            output.logprobs = output.cumulative_logprob = None
        for output, logprobs in zip(result.outputs, said, strict=True):
            if output.index:
                continue
            self.prompt = result.prompt_token_ids or self.prompt
            tokens = list(output.token_ids)
            served = []
            if not self.pick.greedy:
                served = [logprobs[i][token].logprob for i, token in enumerate(tokens)]
            if self.pick.params.output_kind != RequestOutputKind.DELTA:
                self.tokens, self.depths, self.served = [], [], []
            self.tokens += tokens
            self.depths += output.depths
            self.served += served
            self.finished = self.finished or output.finish_reason in FINISHED


def listen(engine_client: Any, picker: Picker, auditor: Auditor) -> None:
    """Let an engine client's requests pass the picker, and their answers the auditor."""
    generate = engine_client.generate

    def picked(params: Any) -> Pick | None:
        progress = progress_of_request()
        if auditor.ended or "use_beam_search" in progress.fields:
            return None  # a beam search asks for every token anew
        try:
            pick = picker.pick(params, progress.resolved)
        except Exception as error:
            warn(error)
            return None
        if isinstance(pick, str):
            auditor.skip(pick)
            return None
        return pick

    def listening(
        prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        pick = picked(sampling_params)
        params = sampling_params if pick is None else pick.params
        results = generate(prompt, params, *args, **kwargs)
        salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None

        def offer(notes: Notes) -> None:
            if notes.finished and notes.tokens:
                auditor.offer(
                    Answer(
                        notes.pick,
                        list(notes.prompt),
                        notes.tokens,
                        notes.depths,
                        notes.served,
                        kwargs.get("lora_request"),
                        salt,
                    )
                )

        notes = None if pick is None else Notes(pick)
        room = auditor.room
        return _noting(results, notes, offer, lambda: room.guest(params.n or 1), room.heard)

    engine_client.generate = listening


async def _noting(
    results: AsyncGenerator[Any, None],
    notes: Notes | None,
    offer: Callable[[Notes], None],
    enter: Callable[[], Any],
    heard: Callable[[Any], None],
) -> AsyncGenerator[Any, None]:
    """`results`, unchanged for who asked; never what breaks them."""
    with enter() as guest:
        async with aclosing(results):
            async for result in results:
                heard(guest)
                if notes is not None:
                    try:
                        notes.hear(result)
                    except Exception as error:
                        warn(error)
                        notes = None
                yield result
    if notes is not None:
        offer(notes)


def warn(error: Exception) -> None:
    """Say that something of audits failed; not in its own words, which may be a user's."""
    logger.warning("an answer could not be noted for an audit: %s", type(error).__name__)
