"""What depth a request means: explicit fields, preset, reasoning effort, model alias, defaults.

Each source gives way to the ones before it. A source that sets only some controls leaves the others
to the server's defaults, not to a weaker source, except that explicit fields refine the preset that
the request means.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ouro_runtime.config import DEPTH_FIELDS, DepthError, ExitParams
from ouro_server.defaults import Defaults
from ouro_server.presets import Preset, PresetBook

PRESET = "depth_preset"
PRIORITY = "priority_class"
EFFORT = "reasoning_effort"
FORCED = "forced_depths"

SOURCES = ("request", "preset", "reasoning_effort", "alias", "default")
"""Where depth may come from, strongest first."""


@dataclass(frozen=True)
class Resolved:
    """A request's depth, complete.

    Attributes:
        params: all controls, for the engine.
        source: the strongest of `SOURCES` that set a control.
        preset: name of the preset that took part, if any.
        priority_class: the request's, else the default one; None if there are no classes.
    """

    params: ExitParams
    source: str
    preset: str | None
    priority_class: str | None

    def controls(self) -> dict[str, Any]:
        """For `SamplingParams.extra_args`."""
        return self.params.controls()


def resolve(
    found: Mapping[str, Any],
    *,
    alias: str | None,
    effort: str | None,
    book: PresetBook,
    defaults: Defaults,
    loops: int,
    effort_field: str = EFFORT,
) -> Resolved:
    """The depth of one request.

    Args:
        found: the controls of the body that are set, `depth_preset` and `priority_class` among
            them, unchecked.
        alias: the preset in the model's name (NAME@PRESET), if that is how it was asked for.
        effort: the request's `reasoning_effort`. effort_field: what its endpoint calls it.

    Raises:
        DepthError: for a value that is not allowed, and for two statements that contradict.
    """
    priority_class = _priority_class(found.get(PRIORITY), book)
    explicit = {k: v for k, v in found.items() if k in DEPTH_FIELDS or k == FORCED}
    if effort is not None and book.efforts:
        _check_name(effort_field, effort, book.efforts)
    source, preset = _intent(found.get(PRESET), alias, effort, book)
    if preset is None:
        base = defaults.base if explicit else defaults.for_class(priority_class)
    else:
        base = ExitParams.parse(book.presets[preset].controls, defaults.base, loops)
    params = ExitParams.parse(explicit, base, loops).settled(loops)
    if source == "preset":
        _check_agreement(explicit, book.presets[str(preset)])
    return Resolved(params, "request" if explicit else source, preset, priority_class)


def _priority_class(name: Any, book: PresetBook) -> str | None:
    if name is None:
        return book.default_class
    _check_name(PRIORITY, name, book.floors)
    return name


def _intent(
    preset: Any, alias: str | None, effort: str | None, book: PresetBook
) -> tuple[str, str | None]:
    """(source, preset) of what a request says beside explicit fields; the effort is a known one."""
    if preset is not None:
        _check_name(PRESET, preset, book.presets)
        if alias is not None and alias != preset:
            raise DepthError(
                PRESET, f"{PRESET} is {preset!r} but the model's name asks for {alias!r}; set one"
            )
        return "preset", preset
    if effort is not None and book.efforts:
        return "reasoning_effort", book.efforts[effort]
    if alias is not None:
        return "alias", alias
    return "default", None


def _check_agreement(explicit: Mapping[str, Any], preset: Preset) -> None:
    """DepthError where a request's own fields contradict the preset it names."""
    for name, value in explicit.items():
        if name in preset.controls and value != preset.controls[name]:
            raise _contradiction(name, value, preset, name)
    both = {**preset.controls, **explicit}
    if "min_loops" in both and "max_loops" in both and both["min_loops"] > both["max_loops"]:
        ends = ("min_loops", "max_loops")
        mine, its = ends if ends[0] in explicit else reversed(ends)
        raise _contradiction(mine, explicit[mine], preset, its)


def _contradiction(name: str, value: Any, preset: Preset, control: str) -> DepthError:
    return DepthError(
        name,
        f"{name} is {value!r} but {PRESET} {preset.name!r} sets {control} to "
        f"{preset.controls[control]!r}; set one of the two",
    )


def _check_name(param: str, name: Any, known: Mapping[str, Any]) -> None:
    if not isinstance(name, str) or name not in known:
        allowed = f"must be one of {', '.join(known)}" if known else "is not set up on this server"
        raise DepthError(param, f"{param} {allowed}, got {name!r}")
