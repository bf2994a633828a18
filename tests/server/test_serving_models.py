"""What the server tells the engine of adapters that come and go."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

from ouro_server.serving_models import DepthServingModels, spelled
from ouro_server.vllm_api import OpenAIServingModels
from tests.server.fakes import serve


def test_a_folder_is_written_in_another_way_each_time(tmp_path: Path) -> None:
    written = [spelled(str(tmp_path), number) for number in range(5000)]
    assert written[0] == str(tmp_path)
    assert len(set(written)) == len(written)
    assert max(map(len, written)) < len(str(tmp_path)) + 40
    assert all(Path(way) == tmp_path for way in written)


def test_the_prefix_cache_never_takes_one_load_of_a_folder_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's key is the name and the path. What is no folder, such as a name on a hub, stays."""
    told: list[Any] = []

    async def load(self: Any, request: Any, base: Any) -> str:
        told.append(request)
        return "loaded"

    monkeypatch.setattr(OpenAIServingModels, "load_lora_adapter", load)
    models = DepthServingModels.__new__(DepthServingModels)
    models.depth = serve()
    for name, path in [*zip("aab", [tmp_path] * 3, strict=True), ("a", "x/y"), ("a", "x/y")]:
        asked = LoadLoRAAdapterRequest(lora_name=name, lora_path=str(path))
        assert asyncio.run(models.load_lora_adapter(asked)) == "loaded"
    keys = [(request.lora_name, request.lora_path) for request in told]
    assert len(set(keys[:3])) == 3
    assert all(Path(path) == tmp_path for _, path in keys[:3])
    assert keys[3:] == [("a", "x/y")] * 2
