"""What the engine could not take is refused when it is handed over, with vLLM's own processing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine.input_processor import InputProcessor

from ouro_server import checkpoint, honest_status
from ouro_server.door import adapted, open_door
from ouro_server.honest_status import Progress
from ouro_server.vllm_api import EngineDeadError, VLLMNotFoundError, VLLMValidationError
from tests.server.fakes import output, replay, result

PROMPT = {"type": "token", "prompt_token_ids": [5, 6, 7]}


@pytest.fixture(scope="module")
def processor() -> Iterator[InputProcessor]:
    config = AsyncEngineArgs(
        str(checkpoint.shipped()), max_model_len=64, scheduling_policy="priority"
    ).create_engine_config()
    renderer = renderer_from_config(config)
    yield InputProcessor(config, renderer)
    renderer.shutdown()


class Client:
    """An engine client behind a door; `handed` are the requests that passed it."""

    def __init__(self, processor: Any, *answers: Any) -> None:
        self.input_processor = processor
        self.errored = False
        self.dead_error = EngineDeadError()
        self.handed: list[Any] = []
        self.answers = answers
        open_door(self, ("generate",))

    def generate(self, prompt: Any, params: Any, request_id: str, **_: Any) -> AsyncIterator[Any]:
        self.handed.append(params)
        return self._results()

    async def _results(self) -> AsyncIterator[Any]:
        for answer in self.answers:
            yield answer

    def ask(self, more: Any = None, **options: Any) -> Any:
        return self.generate(PROMPT, SamplingParams(max_tokens=4, **options), "r", **more or {})


BIG = 2**70
UNSENDABLE: list[tuple[str, dict[str, Any]]] = [
    ("top_k", {"top_k": BIG}),
    ("seed", {"seed": BIG}),
    ("priority", {"more": {"priority": BIG}}),
    ("stop", {"stop": ["\ud800"]}),
    ("chat_template_kwargs", {"more": {"reasoning_parser_kwargs": {"a": BIG}}}),
]


@pytest.mark.parametrize(("field", "options"), UNSENDABLE)
def test_what_cannot_be_sent_is_refused_by_its_name(
    processor: Any, field: str, options: dict[str, Any]
) -> None:
    client = Client(processor)
    with pytest.raises(VLLMValidationError) as refused:
        client.ask(**options)
    assert refused.value.parameter == field
    assert field in str(refused.value)
    assert not client.handed


def test_what_processing_did_not_foresee_is_refused(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(*_: Any, **__: Any) -> None:
        raise RecursionError("deep")

    monkeypatch.setattr(processor, "process_inputs", endless)
    with pytest.raises(VLLMValidationError, match="RecursionError"):
        Client(processor).ask()


def test_a_good_request_passes_and_the_engine_has_it(processor: Any) -> None:
    progress = Progress()
    token = honest_status._progress.set(progress)
    client = Client(processor)
    client.ask()
    honest_status._progress.reset(token)
    assert progress.admitted
    assert len(client.handed) == 1


def test_a_dead_engine_is_asked_nothing(processor: Any) -> None:
    client = Client(processor)
    client.errored = True
    with pytest.raises(EngineDeadError):
        client.ask()
    assert not client.handed


def test_an_adapter_that_the_engine_could_not_load_is_not_found() -> None:
    why = "LoRA adapter 'a' cannot be loaded: no such file"
    lost = result(output([], finish="error", stop_reason=why))

    async def collect() -> None:
        async for _ in adapted(replay([result(output([4])), lost])):
            pass

    with pytest.raises(VLLMNotFoundError, match=why):
        asyncio.run(collect())


@pytest.mark.parametrize("before", [0, 2])
def test_an_error_of_the_engine_under_a_grammar_is_the_grammars(
    processor: Any, before: int
) -> None:
    answers = [result(output([4])) for _ in range(before)]
    client = Client(processor, *answers, result(output([4], finish="error")))
    progress = Progress(fields={"response_format"})
    token = honest_status._progress.set(progress)
    results = client.ask(structured_outputs=StructuredOutputsParams(json={"$ref": "#"}))
    honest_status._progress.reset(token)

    seen: list[Any] = []

    async def collect() -> None:
        async for one in results:
            seen.append(one)

    with pytest.raises(VLLMValidationError) as refused:
        asyncio.run(collect())
    assert refused.value.parameter == "response_format"
    assert len(seen) == before
