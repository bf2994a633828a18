"""The depth controls in force for requests that set none: the operator's, and the controller's."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ouro_runtime.config import DEPTH_FIELDS, RULES, SHARED, DepthError, ExitParams, check_threshold


class Defaults:
    """Default depth controls of one served model, which may change while it serves.

    Requests are resolved on one event loop; each change is a single assignment, so none ever sees
    half of one.

    Args:
        base: the operator's defaults at the start.
        loops: T of the served model.
    """

    def __init__(self, base: ExitParams, loops: int) -> None:
        self._base = base
        self._loops = loops
        self._steered: Mapping[str, float] = {}

    @property
    def base(self) -> ExitParams:
        """The operator's defaults, which complete the controls that a request does set."""
        return self._base

    @property
    def whole(self) -> bool:
        """Whether the operator's defaults answer as full depth does: they run every loop, over the
        K/V of every loop."""
        base = self._base
        off = RULES[base.exit_rule][1]
        every = base.exit_threshold == off and base.max_loops == self._loops
        return every and base.exit_mode != SHARED

    def at(self, threshold: float) -> ExitParams:
        """The controls of a request that sets none, at another threshold."""
        return replace(self._base, exit_threshold=threshold)

    def for_class(self, priority_class: str | None) -> ExitParams:
        """The controls of a request of this class that sets none."""
        threshold = self._steered.get(priority_class) if priority_class is not None else None
        return self._base if threshold is None else self.at(threshold)

    def change(self, fields: Mapping[str, Any]) -> None:
        """Set some of the operator's defaults, all or none; null is unset, as in a request.

        Raises:
            DepthError: naming the first field that is unknown or wrong.
        """
        for name in fields:
            if name not in DEPTH_FIELDS:
                raise DepthError(
                    name,
                    f"{name!r:.100} is no default of depth; known are {', '.join(DEPTH_FIELDS)}",
                )
        changed = ExitParams.parse(fields, self._base, self._loops)
        self._base = replace(changed, guided=self._base.guided)

    def steer(self, thresholds: Mapping[str, float]) -> None:
        """Put thresholds in force by priority class, in place of all earlier ones.

        A class that is not named, and with an empty mapping every class, is back at the operator's.

        Raises:
            DepthError: for a threshold that is none; then nothing changes.
        """
        self._steered = {
            name: check_threshold(value, f"threshold of {name}")
            for name, value in thresholds.items()
        }
