"""What no field of a request body can be, checked on the raw JSON and before any model reads it."""

import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from ouro_server.honest_status import progress_of_request
from ouro_server.vllm_api import VLLMValidationError

DEEPEST = 100
"""Objects and lists inside each other; vLLM lets schemas have 64 of them."""

_SHAPES: dict[str, tuple[type, str]] = {
    "messages": (list, "a list"),
    "tools": (list, "a list"),
    "structured_outputs": (dict, "an object"),
    "vllm_xargs": (dict, "an object"),
}
"""Fields that vLLM looks into before it checks what they are."""

_INT64 = 2**63


async def check_body(raw_request: Request) -> None:
    """Dependency: 400 for a body that holds what JSON, or every field of ours, rules out.

    A body that is no JSON at all is left to the endpoint.
    """
    try:
        body = await raw_request.json()
    except RecursionError:
        raise VLLMValidationError("the body is nested too deeply") from None
    except ValueError:
        return
    if isinstance(body, Mapping):
        for name, value in body.items():
            check_field(name, value)
        progress_of_request().fields = body.keys()


def check_field(name: str, value: Any) -> None:
    """One field of a body.

    Raises:
        VLLMValidationError: naming the field; inside `vllm_xargs`, the field that stands there.
    """
    if name == "vllm_xargs" and isinstance(value, Mapping):
        for inner, one in value.items():
            check_field(inner, one)
        return
    shape = _SHAPES.get(name)
    if shape is not None and value is not None and not isinstance(value, shape[0]):
        _refuse(name, f"{name} must be {shape[1]}")
    if type(value) is int and not -_INT64 <= value < _INT64:
        _refuse(name, f"{name} is an integer that 64 bits do not hold")
    level, depth = [(name, value)], 0
    while level:
        if depth > DEEPEST:
            _refuse(name, f"{name} is nested more than {DEEPEST} levels deep")
        level, depth = _next_level(name, level), depth + 1


def _next_level(name: str, level: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """What stands inside the objects and lists of a level, its texts and numbers checked."""
    inside: list[tuple[Any, Any]] = []
    for key, value in level:
        kind = type(value)
        if kind is dict:
            inside.extend(value.items())
        elif kind is list:
            inside.extend((None, one) for one in value)
        elif kind is float and not math.isfinite(value):
            _refuse(name, f"{name} holds {value}, which is no number in JSON")
        elif kind is str:
            _check_text(name, value)
        if key is not None:
            _check_text(name, key)
    return inside


def _check_text(name: str, text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            _refuse(name, f"{name!r:.100} holds half a surrogate pair, which is no text")


def _refuse(name: str, message: str) -> None:
    field = name.encode(errors="replace").decode()
    raise VLLMValidationError(message.encode(errors="replace").decode(), parameter=field)
