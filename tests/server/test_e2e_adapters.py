"""LoRA adapters over HTTP: loaded at the start and later, chosen by name, with a preset too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from ouro_server.checkpoint import shipped
from tests.engine.adapters import write_adapter
from tests.server.asking import ASK
from tests.server.live import Live, start

pytestmark = pytest.mark.slow

ASKING: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": ASK, "max_tokens": 12},
    "/v1/chat/completions/batch": {"messages": [ASK, ASK], "max_tokens": 12},
    "/v1/completions": {"prompt": "one two", "max_tokens": 12},
    "/v1/messages": {"messages": ASK, "max_tokens": 12},
    "/v1/responses": {"input": "What is 2 + 3?", "max_output_tokens": 12},
    "/invocations": {"messages": ASK, "max_tokens": 12},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of ouro-mini, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second")):
        write_adapter(folder / name, str(shipped()), seed=seed)
    write_adapter(folder / "head", str(shipped()), seed=2, targets=("q_proj", "lm_head"))
    never = torch.zeros(1, 128), torch.tensor([-50.0])
    write_adapter(folder / "never", str(shipped()), seed=3, targets=(), gate=never)
    return folder


@pytest.fixture(scope="module")
def adapted(folder: Path) -> Iterator[Live]:
    options = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
    options += ["--lora-modules", f"first={folder / 'first'}"]
    with start(*options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as server:
        yield server


def names(live: Live) -> list[str]:
    return [model.id for model in live.client.models.list()]


def text(live: Live, model: str, **fields: Any) -> str:
    asked: dict[str, Any] = {"messages": ASK, "max_tokens": 12, "temperature": 0, **fields}
    return live.client.chat.completions.create(model=model, **asked).choices[0].message.content


def load(live: Live, name: str, place: Path) -> Any:
    body = {"lora_name": name, "lora_path": str(place)}
    return live.http.post("/v1/load_lora_adapter", json=body)


def test_an_adapter_has_an_alias_for_every_preset(adapted: Live) -> None:
    for name in ("ouro-mini", "first"):
        assert {name, f"{name}@fast", f"{name}@full"} <= set(names(adapted))
    assert text(adapted, "first") != text(adapted, "ouro-mini")
    assert text(adapted, "first@full") == text(adapted, "first")
    assert (
        adapted.http.post(
            "/v1/completions", json={"model": "first@slow", "prompt": "x"}
        ).status_code
        == 404
    )


@pytest.mark.parametrize("path", ASKING)
def test_every_endpoint_takes_an_adapter_with_a_preset(adapted: Live, path: str) -> None:
    for model, preset in (("first", None), ("first@fast", "fast")):
        answer = adapted.http.post(path, json={"model": model, **ASKING[path]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        said = answer.json()["usage"]["depth"]
        assert (said["source"], said.get("preset")) == ("alias" if preset else "default", preset)


def test_sagemakers_header_names_an_adapter_too(adapted: Live) -> None:
    header = {"X-Amzn-SageMaker-Adapter-Identifier": "first@fast"}
    answer = adapted.http.post("/invocations", json=ASKING["/invocations"], headers=header).json()
    assert (answer["model"], answer["usage"]["depth"]["preset"]) == ("first@fast", "fast")


def test_a_stream_names_the_alias(adapted: Live) -> None:
    asked: dict[str, Any] = {"messages": ASK, "max_tokens": 12, "stream": True}
    stream: Any = adapted.client.chat.completions.create(model="first@fast", **asked)
    assert {chunk.model for chunk in stream} == {"first@fast"}


def test_adapters_come_and_go_while_it_serves(adapted: Live, folder: Path) -> None:
    before = text(adapted, "first"), text(adapted, "ouro-mini")
    assert load(adapted, "second", folder / "second").status_code == 200
    assert {"second", "second@fast"} <= set(names(adapted))
    assert text(adapted, "second@full") not in before
    assert (text(adapted, "first"), text(adapted, "ouro-mini")) == before
    body = {"lora_name": "second"}
    assert adapted.http.post("/v1/unload_lora_adapter", json=body).status_code == 200
    assert "second@fast" not in names(adapted)
    gone = adapted.http.post("/v1/completions", json={"model": "second@fast", "prompt": "x"})
    assert gone.status_code == 404


def test_one_loaded_again_from_its_folder_is_another(adapted: Live, folder: Path) -> None:
    """By SageMaker's route, which asks for the key too. The prompt fills a block, and the prefix
    cache has it of what was in the folder before."""
    place, answers = folder / "again", []
    body, asked = {"name": "again", "src": str(place)}, [{**ASK[0], "content": "2 + 3 = ? " * 20}]
    for name in ("second", "first"):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / name, place)
        assert httpx.post(f"{adapted.url}/adapters", json=body).status_code == 401
        assert adapted.http.post("/adapters", json=body).status_code == 200
        answers.append(text(adapted, "again", messages=asked))
        assert adapted.http.delete("/adapters/again").status_code == 200
    assert answers[1] == text(adapted, "first", messages=asked) != answers[0]


def test_an_adapter_may_bring_a_gate_of_its_own(adapted: Live, folder: Path) -> None:
    """One that never says that a loop suffices."""
    assert load(adapted, "never", folder / "never").status_code == 200
    asked: dict[str, Any] = {"messages": ASK, "max_tokens": 12, "temperature": 0}
    depths, texts = {}, {}
    for model in ("ouro-mini@fast", "never@fast", "ouro-mini@full"):
        answer = adapted.client.chat.completions.create(
            model=model, extra_body={"return_depths": True}, **asked
        )
        depths[model] = set(answer.choices[0].depths)
        texts[model] = answer.choices[0].message.content
    assert depths["never@fast"] == {4} != depths["ouro-mini@fast"]
    assert texts["never@fast"] == texts["ouro-mini@full"]
    body = {"lora_name": "never"}
    assert adapted.http.post("/v1/unload_lora_adapter", json=body).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_one_whose_files_are_gone_is_not_found_and_the_others_answer(
    adapted: Live, folder: Path, stream: bool
) -> None:
    """Another took its place; there are two."""
    before, place = text(adapted, "first"), folder / "leaving"
    shutil.copytree(folder / "second", place)
    for name, files in (("leaving", place), ("second", folder / "second")):
        assert load(adapted, name, files).status_code == 200
    text(adapted, "first")
    shutil.rmtree(place)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/invocations"):
        body = {"model": "leaving@fast", "stream": stream, **ASKING[path]}
        answer = adapted.http.post(path, json=body)
        assert answer.status_code == 404, (path, answer.text)
        assert "LoRA adapter 'leaving' cannot be loaded: " in answer.json()["error"]["message"]
    body = {"model": "leaving", "stream": stream, **ASKING["/v1/responses"]}
    answer = adapted.http.post("/v1/responses", json=body)
    assert "LoRA adapter 'leaving' cannot be loaded: " in answer.text
    assert text(adapted, "first") == before
    for name in ("leaving", "second"):
        body = {"lora_name": name}
        assert adapted.http.post("/v1/unload_lora_adapter", json=body).status_code == 200


def test_adapters_that_cannot_be_loaded_are_refused(adapted: Live, folder: Path) -> None:
    assert load(adapted, "none", folder / "none").status_code == 404
    head = load(adapted, "head", folder / "head")
    assert head.status_code == 400
    assert "lm_head" in head.json()["error"]["message"]
    (folder / "empty").mkdir()
    assert load(adapted, "empty", folder / "empty").status_code in (400, 404)
    assert text(adapted, "first") != text(adapted, "ouro-mini")
