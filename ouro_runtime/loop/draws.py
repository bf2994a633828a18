"""The random numbers of a lossless request: a position's draft and its last read-out draw the same.

So that they agree wherever their distributions do, and so that the answer is the one that the seed
gives at full depth, however many drafts were made on the way.
"""

from __future__ import annotations

from typing import Any


class Draws:
    """One request's generator, and how it stood before each draft that is still to be confirmed. A
    request that draws nothing has none, and nothing happens."""

    def __init__(self) -> None:
        self.generator: Any = None
        self._before: list[Any] = []

    def drafting(self) -> None:
        """A token is about to be drafted."""
        if self.generator is not None:
            self._before.append(self.generator.get_state())

    def rewind(self) -> Any:
        """A position is about to be read out for good: draw as its draft did, if it had one.

        Returns:
            How the generator stood, for `confirm`; None if there was no draft.
        """
        if not self._before:
            return None
        ahead = self.generator.get_state()
        self.generator.set_state(self._before.pop(0))
        return ahead

    def confirm(self, ahead: Any, right: bool) -> None:
        """The token was sampled. `right`: it is the drafted one, and later drafts stand."""
        if not right:
            self._before.clear()
        elif ahead is not None:
            self.generator.set_state(ahead)

    def drop(self) -> None:
        """All drafts are void; the next token draws as the first of them did."""
        if self._before:
            self.generator.set_state(self._before[0])
            self._before.clear()
