"""The depth controls of a request body: found, and checked against the served model's loops.

A field may stand at the top level or inside `vllm_xargs`. The raw JSON is checked, before pydantic
can turn `true` into 1 or "0.5" into a number.
"""

from collections.abc import Mapping
from typing import Any

from ouro_runtime.config import DEPTH_FIELDS, DepthError, ExitParams, LoopConfig

RETURN_DEPTHS = "return_depths"
FORCED_DEPTHS = "forced_depths"
REQUEST_FIELDS = (*DEPTH_FIELDS, RETURN_DEPTHS)

_LONGEST_MESSAGE = 300


def find_controls(body: Mapping[str, Any]) -> dict[str, Any]:
    """The depth controls set in a request body, wherever they stand.

    Raises:
        DepthError: for a field set twice with different values, and for `forced_depths` outside
            `vllm_xargs`.
    """
    if body.get(FORCED_DEPTHS) is not None:
        raise DepthError(FORCED_DEPTHS, "forced_depths is accepted only inside vllm_xargs")
    nested = body.get("vllm_xargs")
    nested = nested if isinstance(nested, Mapping) else {}
    found: dict[str, Any] = {}
    for name in (*REQUEST_FIELDS, FORCED_DEPTHS):
        outer, inner = body.get(name), nested.get(name)
        if outer is not None and inner is not None and not _same(outer, inner):
            raise DepthError(
                name,
                f"{name} is {outer!r} but vllm_xargs.{name} is {inner!r}; set one of the two",
            )
        value = inner if outer is None else outer
        if value is not None:
            found[name] = value
    return found


def check_request(body: Any, config: LoopConfig | None, *, depths: bool = True) -> None:
    """Refuse a request body whose depth controls cannot be honoured.

    Args:
        body: the parsed JSON; anything but an object is left to the request model.
        config: the served model's loops; None when it has none, so that every control is refused.
        depths: whether the endpoint can return depths.

    Raises:
        DepthError: naming the field.
    """
    if not isinstance(body, Mapping):
        return
    try:
        found = find_controls(body)
        if config is None:
            refuse(found, "the served model has no loops")
            return
        wanted = found.pop(RETURN_DEPTHS, False)
        if not isinstance(wanted, bool):
            raise DepthError(RETURN_DEPTHS, f"return_depths must be true or false, got {wanted!r}")
        if wanted and not depths:
            raise DepthError(RETURN_DEPTHS, "return_depths is not supported on this endpoint")
        if body.get("use_beam_search"):
            asked = {**found, RETURN_DEPTHS: True} if wanted else found
            refuse(asked, "beam search takes every token from a request of its own")
        ExitParams.parse(found, config.defaults, config.loops)
    except DepthError as error:
        raise shortened(error) from None
    except OverflowError:
        raise DepthError(
            "exit_threshold", "exit_threshold must be a number from 0 to 1, got a far larger one"
        ) from None


def refuse(found: Mapping[str, Any], reason: str) -> None:
    """DepthError for the first of the controls `found`, if any."""
    for name in found:
        raise DepthError(name, f"{name} is not supported here: {reason}")


def shortened(error: DepthError) -> DepthError:
    """`error` with a message of bounded length: it may quote a value of any size."""
    message = str(error)
    if len(message) <= _LONGEST_MESSAGE:
        return error
    return DepthError(error.param, message[:_LONGEST_MESSAGE] + "...")


def _same(a: Any, b: Any) -> bool:
    """Equality that tells true from 1."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b
