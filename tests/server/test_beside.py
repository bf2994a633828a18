"""The files beside a checkpoint's weights: chat templates, and what options displace."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ouro_server import beside, checkpoint, launch


def with_template(template: object) -> dict[str, str]:
    """The file of a tokenizer whose chat template it is."""
    return {"tokenizer_config.json": json.dumps({"chat_template": template})}


GOOD_TEMPLATE = (
    "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (with_template("{% for m in messages %}"), "tokenizer_config.json: chat_template is no Ji"),
        (with_template("{{ m | no_such }}"), "No filter named 'no_such'"),
        (with_template(3), "tokenizer_config.json: chat_template must be a text"),
        (with_template({"default": "{{"}), "tokenizer_config.json: chat_template is no Jinja"),
        (with_template([{"name": "default"}]), "tokenizer_config.json: chat_template must be a te"),
        (with_template([{"name": "tool_use", "template": "{{"}]), "chat_template is no Jinja"),
        ({"chat_template.jinja": "\n{% if %}"}, r"chat_template.jinja: .* is no Jinja \(.*line 2"),
        ({"additional_chat_templates/rag.jinja": "{{"}, "additional_chat_templates/rag.jinja: "),
    ],
)
def test_a_broken_chat_template_is_named(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(checkpoint.RefusedError, match=said):
        checkpoint.check_files(str(tmp_path), weights=False)


@pytest.mark.parametrize(
    "template", [GOOD_TEMPLATE, [{"name": "default", "template": "x"}], {"default": "x"}]
)
def test_a_chat_template_that_compiles_passes(template: object, tmp_path: Path) -> None:
    for name, text in with_template(template).items():
        (tmp_path / name).write_text(text)
    checkpoint.check_files(str(tmp_path), weights=False)


def test_files_whose_place_an_option_takes_are_not_looked_into(tmp_path: Path) -> None:
    for name, text, options in (
        (beside.TOKENIZER, "{}", ["--tokenizer", str(checkpoint.shipped())]),
        (beside.TOKENIZER, "{}", ["--skip-tokenizer-init"]),
        ("chat_template.jinja", "{{", ["--chat-template", "x"]),
        (beside.GENERATION, '{"top_p": 7}', ["--generation-config", str(checkpoint.shipped())]),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(checkpoint.RefusedError, match=re.escape(name)):
            checkpoint.check_files(str(tmp_path), False, launch.displaced(launch.parse([])))
        checkpoint.check_files(str(tmp_path), False, launch.displaced(launch.parse(options)))
        (tmp_path / name).unlink()
