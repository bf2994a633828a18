"""The depth controls of a request body: found, checked and resolved for the served model.

A field may stand at the top level or inside `vllm_xargs`. The raw JSON is checked, before pydantic
can turn `true` into 1 or "0.5" into a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ouro_runtime.config import DEPTH_FIELDS, RETURN_LOOPS, DepthError, check_guesses
from ouro_runtime.engine.features import VLLMS
from ouro_server.resolve import EFFORT, FORCED, PRESET, PRIORITY, Resolved, resolve
from ouro_server.served import ServedDepth

RETURN_FIELDS = {
    "return_depths": "depths",
    "return_drafts": "drafts",
    "return_exit_cdf": "exit_cdf",
    RETURN_LOOPS: "loops",
}
"""Fields that ask for something of every token, and where a choice of the answer has it."""

REQUEST_FIELDS = (*DEPTH_FIELDS, PRESET, PRIORITY, *RETURN_FIELDS)

SESSION = "session_id"

XARGS = (*REQUEST_FIELDS, FORCED, SESSION, *VLLMS)
"""Keys that mean something inside `vllm_xargs`: depth's, and vLLM's that work here."""

_LONGEST_MESSAGE = 300


@dataclass(frozen=True)
class Endpoint:
    """What differs between the endpoints that know depth.

    Attributes:
        effort: where OpenAI puts the reasoning effort in this endpoint's body.
        returns: whether the answer can carry what `RETURN_FIELDS` ask for.
    """

    effort: tuple[str, ...] = (EFFORT,)
    returns: bool = True


COMPLETIONS = Endpoint()
"""`/v1/chat/completions`, `/v1/completions`, what stands for them (`/invocations`), and batches."""

RESPONSES = Endpoint(effort=("reasoning", "effort"), returns=False)
"""`/v1/responses`."""

MESSAGES = Endpoint(effort=("output_config", "effort"), returns=False)
"""`/v1/messages`."""


def find_controls(body: Mapping[str, Any]) -> dict[str, Any]:
    """The depth controls set in a request body, wherever they stand.

    Raises:
        DepthError: for a field set twice with different values, and for `forced_depths` outside
            `vllm_xargs`.
    """
    if body.get(FORCED) is not None:
        raise DepthError(FORCED, "forced_depths is accepted only inside vllm_xargs")
    nested = body.get("vllm_xargs")
    nested = nested if isinstance(nested, Mapping) else {}
    found: dict[str, Any] = {}
    for name in (*REQUEST_FIELDS, FORCED):
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


def check_xargs(body: Mapping[str, Any]) -> None:
    """DepthError for a key of `vllm_xargs` that nothing reads, such as a misspelt depth field."""
    nested = body.get("vllm_xargs")
    for key in nested if isinstance(nested, Mapping) else ():
        if key not in XARGS:
            raise DepthError(
                key, f"unknown key {key!r:.100} in vllm_xargs; known are {', '.join(XARGS)}"
            )


def read_request(
    body: Any, served: ServedDepth | None, endpoint: Endpoint = COMPLETIONS
) -> Resolved | None:
    """The depth that a request body means.

    Args:
        body: the parsed JSON; anything but an object is left to the request model, and gives None.
        served: the served model's depth; None when it has no loops, so that every control is
            refused and the answer is None.
        endpoint: the one that the request came to.

    Raises:
        DepthError: naming the field that cannot be honoured.
    """
    if not isinstance(body, Mapping):
        return None
    try:
        found = find_controls(body)
        if served is None:
            refuse(found, "the served model has no loops")
            return None
        if served.known_xargs:
            check_xargs(body)
        return _read(body, found, served, endpoint)
    except DepthError as error:
        raise shortened(error) from None
    except OverflowError:
        raise DepthError(
            "exit_threshold", "exit_threshold must be a number from 0 to 1, got a far larger one"
        ) from None


def _read(
    body: Mapping[str, Any], found: dict[str, Any], served: ServedDepth, endpoint: Endpoint
) -> Resolved:
    wanted = _flags(found, endpoint)
    effort, alias = _effort(body, endpoint), served.alias(body.get("model"))
    if body.get("use_beam_search"):
        asked = {**found, **wanted, **({} if effort is None else {EFFORT: effort})}
        _refuse_all(
            asked,
            body.get("model"),
            alias,
            "beam search takes every token from a request of its own",
        )
    return resolve(
        found,
        alias=None if alias is None else alias[1],
        effort=effort,
        book=served.book,
        defaults=served.defaults,
        loops=served.loops,
        effort_field=".".join(endpoint.effort),
    )


def _flags(found: dict[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    """The fields of `RETURN_FIELDS` that ask for something, taken out of `found`."""
    wanted: dict[str, Any] = {}
    for name in RETURN_FIELDS:
        flag = found.pop(name, False)
        if name == RETURN_LOOPS and flag is not False:
            flag = check_guesses(flag)
        elif not isinstance(flag, bool):
            raise DepthError(name, f"{name} must be true or false, got {flag!r}")
        if flag and not endpoint.returns:
            raise DepthError(name, f"{name} is not supported on this endpoint")
        if flag:
            wanted[name] = flag
    return wanted


def _effort(body: Mapping[str, Any], endpoint: Endpoint) -> str | None:
    """The reasoning effort of a body; what is no text is left to the request model."""
    if EFFORT not in endpoint.effort and body.get(EFFORT) is not None:
        raise DepthError(EFFORT, f"{EFFORT} is {'.'.join(endpoint.effort)} on this endpoint")
    value: Any = body
    for key in endpoint.effort:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None


def refuse_everything(body: Mapping[str, Any], served: ServedDepth | None) -> None:
    """DepthError if a body says anything of depth: for an endpoint that knows none."""
    alias = None if served is None else served.alias(body.get("model"))
    inner = body.get("sampling_params")
    extra = inner.get("extra_args") if isinstance(inner, Mapping) else None
    try:
        for part in (body, {"vllm_xargs": extra} if isinstance(extra, Mapping) else {}):
            _refuse_all(
                find_controls(part), body.get("model"), alias, "this endpoint knows no depth"
            )
            if served is not None and served.known_xargs:
                check_xargs(part)
    except DepthError as error:
        raise shortened(error) from None


def _refuse_all(found: Mapping[str, Any], model: Any, alias: Any, reason: str) -> None:
    """As `refuse`; so is the name of a model that is an alias."""
    refuse(found, reason)
    if alias is not None:
        raise DepthError("model", f"model {model!r} is not supported here: {reason}")


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
