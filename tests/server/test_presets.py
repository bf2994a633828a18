"""The presets file: what a server takes, and what it refuses at the start."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from ouro_server.presets import EFFORTS, SHIPPED, PresetBook, PresetError

WHOLE = """
presets:
  quick: {exit_threshold: 0.2, max_loops: 3, description: For drafts.}
  exact: {exit_mode: exact}
reasoning_effort: {low: quick}
priority_classes:
  paying: {floor: 1}
  batch: {floor: 0}
default_priority_class: batch
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "presets.yaml"


def load(file: Path, text: str, loops: int = 4) -> PresetBook:
    file.write_text(text)
    return PresetBook.load(file, loops)


def test_a_file_is_read_as_it_stands(file: Path) -> None:
    book = load(file, WHOLE)
    quick = {"exit_threshold": 0.2, "max_loops": 3, "exit_rule": "gate"}
    assert book.presets["quick"].controls == quick
    assert book.presets["quick"].description == "For drafts."
    assert book.presets["exact"].controls == {"exit_mode": "exact"}
    assert book.efforts == {"low": "quick"}
    assert (book.floors, book.default_class) == ({"paying": 1.0, "batch": 0.0}, "batch")


@pytest.mark.parametrize("loops", [1, 2, 4, 64])
def test_the_shipped_file_serves_a_model_of_any_depth(loops: int) -> None:
    book = PresetBook.load(SHIPPED, loops)
    assert list(book.presets) == ["fast", "balanced", "quality", "full"]
    assert set(book.efforts) == set(EFFORTS)
    assert all(preset.description for preset in book.presets.values())


def test_efforts_are_those_that_vllm_takes() -> None:
    literal, _ = get_args(ChatCompletionRequest.model_fields["reasoning_effort"].annotation)
    assert get_args(literal) == EFFORTS


def test_an_empty_file_has_no_presets(file: Path) -> None:
    book = load(file, "")
    assert (book.presets, book.efforts, book.floors, book.default_class) == ({}, {}, {}, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "the file must be a mapping"),
        ("preset: {}", "unknown 'preset'; known are presets, reasoning_effort"),
        ("presets: [fast]", "presets must be a mapping"),
        ("presets: {a: 0.5}", "preset 'a' must be a mapping, got 0.5"),
        ("presets: {a: {}}", "preset 'a': must set at least one of exit_threshold"),
        ("presets: {a: {description: x}}", "preset 'a': must set at least one"),
        ("presets: {a: {threshold: 1}}", "preset 'a': unknown 'threshold'; known are exit_thr"),
        ("presets: {a: {exit_threshold: 2}}", "'a': exit_threshold must be a number from 0 to 1"),
        ("presets: {a: {exit_threshold: yes}}", "exit_threshold must be a number"),
        ("presets: {a: {exit_threshold: .nan}}", "exit_threshold must be a number"),
        ("presets: {a: {exit_threshold: }}", "exit_threshold has no value"),
        ("presets: {a: {max_loops: 5}}", "'a': max_loops must be an integer from 1 to 4, got 5"),
        ("presets: {a: {min_loops: 3, max_loops: 2}}", r"min_loops \(3\) must not exceed"),
        ("presets: {a: {exit_mode: full}}", "exit_mode must be one of auto, skip, exact"),
        ("presets: {a: {exit_rule: margin}}", "exit_rule needs exit_threshold"),
        ("presets: {a: {exit_rule: gate, exit_threshold: 1.5}}", "from 0 to 1"),
        ("presets: {a: {exit_threshold: 1, description: 3}}", "description must be text"),
        ("presets: {a b: {exit_threshold: 1}}", "a name must be up to 64"),
        ("presets: {a@b: {exit_threshold: 1}}", "a name must be up to 64"),
        ("presets: {on: {exit_threshold: 1}}", "a name must be .* got True"),
        ("presets:\n  a: {min_loops: 1}\n  a: {min_loops: 2}", "'a' stands twice .* line 2"),
        ("presets: {a: {min_loops: 1, min_loops: 2}}", "'min_loops' stands twice"),
        ("presets: {}\npresets: {}", "'presets' stands twice"),
        ("reasoning_effort: {low: a}", "reasoning_effort: low: must be one of none, for there"),
        ("reasoning_effort: {lowest: a}", "unknown 'lowest'; known are none, minimal"),
        ("priority_classes: {a: {floor: 2}}", "class 'a': floor must be a number from 0 to 1"),
        ("priority_classes: {a: {}}", "class 'a': floor must be a number from 0 to 1, got None"),
        ("priority_classes: {a: {ceiling: 1}}", "class 'a': unknown 'ceiling'"),
        ("priority_classes: {a: {floor: 1}}", "default_priority_class: must be one of a, got None"),
        ("default_priority_class: a", "default_priority_class: must be one of none"),
        ("presets: {a: &x {floor", "not YAML"),
        ("presets: {? [a] : 1}", "not YAML|a name must be"),
        ("presets: !!python/name:os.system ''", "not YAML"),
        ("\x00", "not YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_entry_and_rule(
    file: Path, text: str, reason: str
) -> None:
    with pytest.raises(PresetError, match=reason) as refused:
        load(file, text)
    assert str(refused.value).startswith(f"{file}: ")
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(file: Path) -> None:
    with pytest.raises(PresetError, match=r"cannot be read \(No such file"):
        PresetBook.load(file, 4)
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(PresetError, match="not YAML"):
        PresetBook.load(file, 4)


def test_a_preset_is_checked_against_the_models_loops(file: Path) -> None:
    text = "presets: {a: {max_loops: 5}}"
    assert load(file, text, loops=6).presets["a"].controls == {"max_loops": 5}
    with pytest.raises(PresetError, match="from 1 to 4"):
        load(file, text, loops=4)
