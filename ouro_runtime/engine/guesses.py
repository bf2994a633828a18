"""What each loop would have said: its likeliest tokens, for requests that ask (`return_loops`).

A loop's guesses are read out of the state that its pass left, before it is known whether the token
is read out there. They wait with their request until it is, and ride to the API process behind the
token's note (`step_output.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from ouro_runtime.loop.greedy import largest

NOT_RUN = -1
"""Stands for the token ids of a loop that did not run."""


@dataclass
class Guesses:
    """Those of one request, of positions whose token is not known yet.

    Attributes:
        most: guesses a loop. loops: T.
    """

    most: int
    loops: int
    _waiting: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def hear(self, position: int, loop: int, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Take in `ids` [>= most] and `logprobs`, likeliest first, of a loop from 0 on."""
        if loop == 0 or position not in self._waiting:
            shape = (self.loops, self.most)
            self._waiting[position] = np.full(shape, NOT_RUN), np.zeros(shape, np.float32)
        held_ids, held_logprobs = self._waiting[position]
        count = min(self.most, len(ids))
        held_ids[loop, :count], held_logprobs[loop, :count] = ids[:count], logprobs[:count]

    def take(self, first: int, notes: np.ndarray) -> np.ndarray:
        """Put the guesses of the positions from `first` on behind their `notes` [tokens, C] int16.

        Returns:
            [tokens, C + 2 * T * most + 2] int32: the notes; by loop, ids (`NOT_RUN` where there is
            none); log-probabilities as bits of float32; T and `most`.
        """
        parts = [self._waiting.pop(first + place) for place in range(len(notes))]
        shape = (len(notes), self.loops * self.most)
        ids = np.array([part for part, _ in parts], np.int32).reshape(shape)
        logprobs = np.array([part for _, part in parts], np.float32).reshape(shape)
        ends = np.tile(np.array([self.loops, self.most], np.int32), (len(notes), 1))
        return np.concatenate([notes.astype(np.int32), ids, logprobs.view(np.int32), ends], axis=1)


def unpack(packed: np.ndarray) -> list[list[list[tuple[int, float]]]]:
    """Of what `Guesses.take` made, by token and loop that ran: (id, log-probability) pairs,
    likeliest first; empty for notes without any."""
    if packed.dtype != np.int32 or not len(packed):
        return []
    loops, most = packed[0, -2:].tolist()
    size = loops * most
    ids = packed[:, -2 - 2 * size : -2 - size].reshape(-1, loops, most)
    logprobs = np.ascontiguousarray(packed[:, -2 - size : -2]).view(np.float32)
    return [
        [
            [(token, value) for token, value in zip(*pair, strict=True) if token != NOT_RUN]
            for pair in zip(of_ids, of_logprobs, strict=True)
            if pair[0][0] != NOT_RUN
        ]
        for of_ids, of_logprobs in zip(
            ids.tolist(), logprobs.reshape(ids.shape).tolist(), strict=True
        )
    ]


def likeliest(logits: torch.Tensor, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Of logits [M, vocab] the `most` likeliest tokens (fewer in a smaller vocabulary), in order:
    ids and log-probabilities [M, most]."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = largest(logprobs, min(most, logprobs.shape[-1]))
    return ids.numpy(), values.numpy()
