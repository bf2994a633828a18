"""Every command of the documentation is run, or checked as far as it can be.

Those that ask a server are run in `tests/server/test_docs.py`, where one is at hand, and so are the
options of `ouro-serve` checked.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from itertools import pairwise

import pytest
import yaml

from tests.docs.blocks import ALL, DOCS, ROOT, SHELL, Block, Command, blocks, commands

DATA = ("json", "yaml", "python", "text")
"""Languages of blocks that are no commands. Python is run in tests/server/test_docs.py; text is a
synopsis, whose options are checked there."""

NOT_RUN = {
    "ouro-serve": "serves until it is stopped; tests/server/test_docs.py checks its options",
    "docker": "needs Docker's daemon; tests/project checks the files, and here that they exist",
    "kubectl": "needs a cluster; tests/project/test_kubernetes.py checks the files",
    "make": "installs and serves; a dry run shows that make knows the targets",
    "python": "run in tests/docs/test_fleet.py, tests/model/test_quantize.py and tests/training",
}
"""First words of commands that are not run, and why."""

BLOCKS = [block for document in DOCS for block in blocks(document)]
OF_MAKE = [command for command in ALL if command.words[0] == "make"]
OF_DOCKER = [command for command in ALL if command.words[0] == "docker"]


@pytest.mark.parametrize("document", DOCS)
def test_there_are_commands(document: str) -> None:
    assert list(commands(document))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_of_a_kind_that_is_tested(block: Block) -> None:
    assert block.language in SHELL + DATA


@pytest.mark.parametrize("command", ALL, ids=str)
def test_every_command_is_run_or_listed_with_a_reason(command: Command) -> None:
    assert command.asks_a_server != (command.words[0] in NOT_RUN)


@pytest.mark.parametrize("command", OF_MAKE, ids=str)
def test_make_knows_the_target(command: Command) -> None:
    # The suite itself may run under make, which hands its own settings down.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    make = [*command.words, "--dry-run"]
    done = subprocess.run(make, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", OF_DOCKER, ids=str)
def test_files_given_to_docker_exist(command: Command) -> None:
    given = [after for flag, after in pairwise(command.words) if flag == "-f"]
    assert given
    for name in given:
        assert (ROOT / name).is_file()


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("json", "yaml")], ids=str)
def test_data_can_be_read(block: Block) -> None:
    """JSON may be a part of an object."""
    if block.language == "yaml":
        assert yaml.safe_load(block.text)
    else:
        whole = block.text.lstrip().startswith("{")
        assert json.loads(block.text if whole else f"{{{block.text}}}")


@pytest.mark.parametrize("document", DOCS)
def test_links_lead_somewhere(document: str) -> None:
    """To a file of the repository, and to a heading where one is named."""
    here = ROOT / document
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", here.read_text()):
        file = (here.parent / target).resolve() if target else here
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = [
                re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings
            ]
            assert anchor in slugs, f"{target}#{anchor}"
