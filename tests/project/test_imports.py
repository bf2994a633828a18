"""The import rules hold, and a violation of each would be found."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.check_imports import violations


def test_rules_hold() -> None:
    assert violations() == []


def plant(root: Path, module: str, line: str) -> None:
    """A tree in which `module` says `line`."""
    first = module.partition(".")[0]
    outer = {"ouro_kernels": "kernels", "ouro_server": "server"}.get(first, "")
    file = root / outer / f"{module.replace('.', '/')}.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"def late():\n    {line}\n")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ouro_kernels.gate.triton", "import numpy"),
        ("ouro_kernels.gate.triton", "from ouro_runtime import config"),
        ("ouro_runtime.metrics", "import ouro_server"),
        ("ouro_runtime.loop.executor", "from ouro_runtime.engine.requests import LoopRequest"),
        ("ouro_runtime.loop.executor", "from ..engine import requests"),
        ("ouro_runtime.exit.gate", "from ouro_runtime.loop import planner"),
        ("ouro_runtime.cache.pages", "import ouro_runtime.engine.cpu.scheduler as s"),
        ("ouro_runtime.model.ouro", "from ouro_runtime import engine"),
        ("ouro_runtime.loop.executor", "from vllm.v1.request import Request"),
        ("ouro_runtime.training.model", "import vllm"),
        ("ouro_runtime.config", "from ouro_runtime.loop import planner"),
        ("ouro_runtime.checkpoint_config", "from ouro_runtime.config import LoopConfig"),
        ("ouro_runtime.loop.planner", "import torch.nn"),
        ("ouro_runtime.loop.planner_budget", "import torch"),
        ("ouro_runtime.model.checkpoint", "from torch import nn"),
        ("ouro_server.routes", "from vllm import LLM"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, module: str, line: str) -> None:
    plant(tmp_path, module, line)
    (found,) = violations(tmp_path)
    assert ":2: imports " in found


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ouro_kernels.gate.triton", "import math, torch, triton.language"),
        ("ouro_kernels.gate.triton", "from ouro_kernels import checks"),
        ("ouro_runtime.engine.cpu.scheduler", "from ouro_runtime.loop import planner"),
        ("ouro_runtime.engine.cpu.scheduler", "from vllm.v1.request import Request"),
        ("ouro_runtime.loop.executor", "import torch"),
        ("ouro_runtime.loop.planner", "import numpy"),
        ("ouro_runtime.model.ouro", "from ouro_runtime.exit import gate"),
        ("ouro_runtime.cache.standin", "import ouro_kernels"),
        ("ouro_runtime.config", "from ouro_runtime.checkpoint_config import check_config"),
        ("ouro_server.vllm_api", "from vllm import LLM"),
        ("ouro_server.routes", "from ouro_runtime.config import LoopConfig"),
    ],
)
def test_allowed_import_is_not_reported(tmp_path: Path, module: str, line: str) -> None:
    plant(tmp_path, module, line)
    assert violations(tmp_path) == []
