"""How fast a request's tokens reach its client."""


class Pace:
    """The deliveries of one request. The first, which waits for the prompt, is not counted.

    Attributes:
        tokens: delivered after the first delivery.
        seconds: from the first delivery to the last.
    """

    __slots__ = ("_last", "seconds", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._last: float | None = None

    def deliver(self, now: float, tokens: int) -> float | None:
        """Note `tokens` delivered at `now`; the seconds since the delivery before, if any."""
        last, self._last = self._last, now
        if last is None:
            return None
        self.tokens += tokens
        self.seconds += now - last
        return now - last

    @property
    def seconds_per_token(self) -> float | None:
        """The mean over the tokens after the first delivery; None without any."""
        return self.seconds / self.tokens if self.tokens else None
