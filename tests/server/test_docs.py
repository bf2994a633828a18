"""The documentation's commands that ask a server, run as written, and the options it names."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ouro_runtime.loop import simulate
from ouro_runtime.model import quantize
from ouro_server import settings
from ouro_server.calibrate.plan import Plan, build_parser
from ouro_server.presets import PresetBook
from tests.docs.blocks import ALL, DOCS, ROOT, SERVER, Block, Command, blocks
from tests.server.asking import ASK
from tests.server.live import KEY, LOOPS, Live

TO_SERVER = [command for command in ALL if command.asks_a_server]
TO_START = [command for command in ALL if command.words[0] == "ouro-serve"]
PYTHON = [block for document in DOCS for block in blocks(document) if block.language == "python"]
PRESETS = [
    block
    for document in DOCS
    for block in blocks(document)
    if block.language == "yaml" and "presets:" in block.text
]
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
AS_SHIPPED = {"agree-95": "balanced"}
"""Presets that a user's own file has, by the one of the shipped file that is asked for instead."""

OF_OTHERS = {"--build", "--from-literal", "--minutes", "--time", "--wait"}
"""Options of other programs in the documentation: docker's, kubectl's, of our training."""


@pytest.fixture
def defaults_restored(live: Live) -> Iterator[None]:
    """Whatever a command does to the shared server's defaults is undone."""
    before = live.http.get("/v1/depth").json()["defaults"]
    yield
    assert live.http.put("/v1/depth", json=before).status_code == 200


@pytest.mark.slow
@pytest.mark.usefixtures("defaults_restored")
@pytest.mark.parametrize("command", TO_SERVER, ids=str)
def test_the_command_works(live: Live, tmp_path: Path, command: Command) -> None:
    """Run by a shell; curl is told by its own configuration file which key to send."""
    rc = f'header = "Authorization: Bearer {KEY}"\nwrite-out = "%{{stderr}}<%{{http_code}}>"\n'
    (tmp_path / ".curlrc").write_text(rc)
    text = command.text.replace(SERVER, live.url)
    for own, shipped in AS_SHIPPED.items():
        text = text.replace(own, shipped)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        env=os.environ | {"CURL_HOME": str(tmp_path), "KEY": KEY},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(command.answer.text) if command.answer else {}
    expected = shown["error"]["code"] if "error" in shown else 200
    assert re.findall(r"<(\d+)>", done.stderr) == [str(expected)], done.stdout
    assert done.stdout or "health" in command.text
    if shown:
        assert_shown(shown, json.loads(done.stdout))


def assert_shown(shown: Any, answer: Any) -> None:
    """What the documentation shows of an answer is in the answer, of the same kind."""
    if isinstance(shown, dict):
        assert isinstance(answer, dict)
        assert shown.keys() <= answer.keys()
        for key, value in shown.items():
            assert_shown(value, answer[key])
    elif isinstance(shown, str):
        assert shown == answer
    elif shown is not None:
        assert isinstance(answer, int | float if isinstance(shown, int | float) else type(shown))


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_the_python_works(live: Live, block: Block) -> None:
    exec(compile(block.text, str(block), "exec"), {"client": live.client, "messages": ASK})


@pytest.mark.parametrize("block", PRESETS, ids=str)
def test_the_presets_are_valid(block: Block) -> None:
    assert PresetBook.parse(yaml.safe_load(block.text), LOOPS).presets


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """vLLM's part of the command line."""
    from ouro_server import launch

    return launch.build_parser()


@pytest.mark.parametrize("command", TO_START, ids=str)
def test_ouro_serve_takes_the_options(command: Command, parser: argparse.ArgumentParser) -> None:
    if command.words[1] == "calibrate":
        options, rest = build_parser().parse_known_args(command.words[2:])
        assert Plan.of(options) and not rest
        return
    _, rest = settings.depth_parser().parse_known_args(command.words[1:])
    parser.parse_args(rest)


@pytest.mark.parametrize("document", DOCS)
def test_every_option_exists(document: str, parser: argparse.ArgumentParser) -> None:
    named = set(OPTION.findall((ROOT / document).read_text()))
    ours = (settings.depth_parser(), build_parser(), parser)
    others = (simulate.build_parser(), quantize.build_parser())
    known = {name for one in (*ours, *others) for name in one._option_string_actions}
    assert named - OF_OTHERS <= known


def test_operations_lists_our_own_options() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    table = text.split("Ouro Serve's own:")[1].split("Of vLLM's")[0]
    own = {action.option_strings[0] for action in settings.depth_parser()._actions}
    assert set(OPTION.findall(table)) == own
