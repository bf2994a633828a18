"""What the prefix cache may offer: positions with true K/V at every loop, from the first on."""


class CleanPrefix:
    """How far one request's K/V can be shared, from the depths its tokens left at.

    Token i (0-based) is read out at position `prompt + i - 1`; its depth is that position's. The
    prompt's own positions always run every loop. In `skip` mode a position that left early ends
    the clean prefix for good. In `exact` mode a position's deeper loops run up to T - 1 passes
    after its read-out, within the step after: so it counts one step late. In `lossless` a
    token stands once its position has run every loop, whatever the loop it was first known at.

    Args:
        prompt: number of prompt tokens. loops: T. mode: the request's exit mode.
    """

    def __init__(self, prompt: int, loops: int, mode: str) -> None:
        self.length = prompt
        self._loops = loops
        self._exact, self._lossless = mode == "exact", mode == "lossless"
        self._open = True
        self._pending = 0
        self._tokens = 0

    def step(self, depths: list[int]) -> int:
        """Take in the depths of the tokens of one engine step.

        Returns:
            The number of leading positions that may be published from now on.
        """
        if self._exact:
            self.length += self._pending
            self._pending = 0
        for depth in depths:
            self._tokens += 1
            if self._tokens == 1:
                continue
            if self._exact:
                self._pending += 1
            elif self._lossless or (self._open and depth == self._loops):
                self.length += 1
            else:
                self._open = False
        return self.length
