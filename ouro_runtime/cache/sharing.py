"""What the prefix cache may offer: positions with true K/V, from the first on, loop by loop."""


class CleanPrefix:
    """How far one request's K/V can be shared, from the depths its tokens left at.

    Token i (0-based) is read out at position `prompt + i - 1`; its depth is that position's. The
    prompt's own positions always run every loop. In `skip` mode a position that left at d ends
    the clean prefix of the loops after d for good: what follows is computed from its stand-ins. In
    `exact` mode a position's deeper loops run up to T - 1 passes after its read-out, within the
    step after: so it counts one step late. In `lossless` a token stands once its position has run
    every loop, whatever the loop it was first known at. In `shared` no generated position counts.

    Args:
        prompt: number of prompt tokens. loops: T. mode: the request's exit mode.
    """

    def __init__(self, prompt: int, loops: int, mode: str) -> None:
        self.by_loop = [prompt] * loops
        self._exact, self._lossless = mode == "exact", mode == "lossless"
        self._open = 0 if mode == "shared" else loops
        self._pending = 0
        self._tokens = 0

    @property
    def length(self) -> int:
        """Of every loop."""
        return self.by_loop[-1]

    def step(self, depths: list[int]) -> int:
        """Take in the depths of the tokens of one engine step.

        Returns:
            The number of leading positions that may be published from now on at every loop.
        """
        if self._exact:
            self._grow(self._pending)
            self._pending = 0
        for depth in depths:
            self._tokens += 1
            if self._tokens == 1:
                continue
            if self._exact:
                self._pending += 1
                continue
            if not self._lossless:
                self._open = min(self._open, depth)
            self._grow(1)
        return self.length

    def _grow(self, positions: int) -> None:
        for loop in range(self._open):
            self.by_loop[loop] += positions
