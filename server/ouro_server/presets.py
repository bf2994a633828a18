"""Depth by intent: the presets file, read and validated once, at start-up."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ouro_runtime.config import (
    DEPTH_FIELDS,
    GATE,
    RULE,
    THRESHOLD,
    DepthError,
    ExitParams,
    check_threshold,
)

SHIPPED = Path(__file__).with_name("presets.yaml")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""OpenAI's values of `reasoning_effort`, as vLLM takes them."""

SECTIONS = ("presets", "reasoning_effort", "priority_classes", "default_priority_class")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class PresetError(ValueError):
    """A presets file that cannot be used; the message names the file, the entry and the rule."""


@dataclass(frozen=True)
class Preset:
    """A named intent: `controls` holds only the depth controls it sets, at least one."""

    name: str
    controls: Mapping[str, Any]
    description: str = ""


@dataclass(frozen=True)
class PresetBook:
    """What a presets file says.

    Attributes:
        presets: by name, in the file's order.
        efforts: value of `reasoning_effort` -> name of a preset; empty if efforts set no depth.
        floors: priority class -> the lowest threshold the latency controller may choose for it.
        default_class: the class of a request that names none; None if there are no classes.
    """

    presets: Mapping[str, Preset]
    efforts: Mapping[str, str]
    floors: Mapping[str, float]
    default_class: str | None

    @classmethod
    def load(cls, path: Path, loops: int) -> "PresetBook":
        """The presets file at `path`, checked for a model of `loops` loops.

        Raises:
            PresetError: naming the file, the entry, and what is allowed.
        """
        try:
            return cls.parse(_read(path), loops)
        except PresetError as error:
            raise PresetError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, content: Any, loops: int) -> "PresetBook":
        """A parsed presets file, checked for a model of `loops` loops.

        Raises:
            PresetError: naming the entry, and what is allowed.
        """
        content = _mapping(content, "the file", SECTIONS)
        presets = {
            _name(name, "presets"): _preset(name, fields, loops)
            for name, fields in _mapping(content.get("presets"), "presets").items()
        }
        efforts = _mapping(content.get("reasoning_effort"), "reasoning_effort", EFFORTS)
        for effort, preset in efforts.items():
            _one_of(preset, presets, f"reasoning_effort: {effort}")
        floors = {
            _name(name, "priority_classes"): _floor(name, fields)
            for name, fields in _mapping(
                content.get("priority_classes"), "priority_classes"
            ).items()
        }
        default_class = content.get("default_priority_class")
        if floors or default_class is not None:
            _one_of(default_class, floors, "default_priority_class")
        return cls(presets, efforts, floors, default_class)

    def aliases(self, models: Iterable[str]) -> dict[str, str]:
        """MODEL@PRESET -> preset, for every served name and preset; a served name stays a name."""
        models = list(models)
        every = {f"{model}@{preset}": preset for model in models for preset in self.presets}
        return {alias: preset for alias, preset in every.items() if alias not in models}


class _StrictLoader(yaml.SafeLoader):
    """YAML in which no key may stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            line = node.start_mark.line + 1
            raise PresetError(f"{twice!r} stands twice in the mapping that begins on line {line}")
        return super().construct_mapping(node, deep)


def _read(path: Path) -> Any:
    try:
        # A SafeLoader all the same: it builds plain data only.
        return yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise PresetError(f"cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PresetError(f"not YAML ({' '.join(str(error).split())})") from None


def _mapping(value: Any, where: str, allowed: Iterable[str] | None = None) -> dict[Any, Any]:
    """`value` as a mapping, {} for null; PresetError for a key that is not `allowed`."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PresetError(f"{where} must be a mapping, got {value!r:.100}")
    if allowed is not None:
        for key in value:
            if key not in allowed:
                raise PresetError(f"{where}: unknown {key!r:.100}; known are {', '.join(allowed)}")
    return value


def _name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PresetError(
            f"{where}: a name must be up to 64 letters, digits, '.', '_' and '-', beginning with "
            f"a letter or a digit, got {name!r:.100}"
        )
    return name


def _preset(name: str, fields: Any, loops: int) -> Preset:
    where = f"preset {name!r}"
    controls = dict(_mapping(fields, where, (*DEPTH_FIELDS, "description")))
    description = controls.pop("description", "")
    if not isinstance(description, str):
        raise PresetError(f"{where}: description must be text, got {description!r:.100}")
    for field, value in controls.items():
        if value is None:
            raise PresetError(f"{where}: {field} has no value; leave it out or set one")
    if not controls:
        raise PresetError(f"{where}: must set at least one of {', '.join(DEPTH_FIELDS)}")
    if RULE in controls and THRESHOLD not in controls:
        raise PresetError(
            f"{where}: {RULE} needs {THRESHOLD}, which has the rule's unit, beside it"
        )
    if THRESHOLD in controls:
        # Whatever rule a server has: a threshold without one is the gate's.
        controls.setdefault(RULE, GATE)
    try:
        ExitParams.parse(controls, ExitParams(1.0, 1, loops, "skip"), loops)
    except DepthError as error:
        raise PresetError(f"{where}: {error}") from None
    return Preset(name, controls, description)


def _floor(name: str, fields: Any) -> float:
    where = f"priority class {name!r}"
    try:
        return check_threshold(_mapping(fields, where, ("floor",)).get("floor"), "floor")
    except DepthError as error:
        raise PresetError(f"{where}: {error}") from None


def _one_of(value: Any, names: Iterable[str], where: str) -> None:
    names = tuple(names)
    if value not in names:
        known = ", ".join(names) or "none, for there are none in the file"
        raise PresetError(f"{where}: must be one of {known}, got {value!r:.100}")
