"""LoRA: tokens and depths are those of the merged weights, whoever shares the passes.

Of the adapters one adapts the exit gate too, one brings a gate of its own.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.lora.request import LoRARequest

from tests.engine.adapters import ALL, GATE, merge, random_gate, write_adapter
from tests.engine.cases import CHECKPOINTS
from tests.engine.compare import assert_same
from tests.engine.harness import (
    Output,
    assert_idle,
    count_preemptions,
    engine,
    generate,
    greedy,
    runner_of,
)

CHECKPOINT = CHECKPOINTS["t4-mha"]
NAMES = ("base", "all", "attention")
DEPTHS: list[dict[str, Any]] = [
    {"exit_threshold": 1.0},
    {"exit_threshold": 0.3},
    {"exit_threshold": 0.5, "exit_mode": "exact"},
    {"exit_threshold": 0.5, "exit_mode": "lossless"},
    {"forced_depths": [1, 4, 2, 3]},
    {"exit_threshold": 0.5, "exit_mode": "shared"},
    {"exit_threshold": 0.2, "exit_rule": "margin"},
    {"exit_threshold": 0.5, "exit_rule": "delta", "exit_mode": "exact"},
]
TOKENS = 24


def prompts() -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(256) for _ in range(length)] for length in (3, 40, 17, 5, 70)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "all": write_adapter(folder / "all", CHECKPOINT, seed=1, targets=(*ALL, GATE)),
        "attention": write_adapter(
            folder / "attention",
            CHECKPOINT,
            seed=2,
            rank=2,
            targets=("q_proj", "v_proj"),
            gate=random_gate(128, seed=3),
        ),
    }


@pytest.fixture(scope="module")
def merged(
    adapters: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[list[Output]]]:
    """By name and depth, what the merged checkpoints answer to the prompts."""
    folder, answers = tmp_path_factory.mktemp("merged"), {}
    for name in NAMES:
        checkpoint = (
            CHECKPOINT if name == "base" else merge(folder / name, CHECKPOINT, adapters[name])
        )
        with engine(checkpoint) as llm:
            answers[name] = [generate(llm, prompts(), greedy(TOKENS, d)) for d in DEPTHS]
    assert answers["base"][0][0].tokens != answers["all"][0][0].tokens
    assert answers["base"][0][0].tokens != answers["attention"][0][0].tokens
    return answers


@pytest.fixture(scope="module")
def serving(merged: dict[str, list[list[Output]]]) -> Iterator[LLM]:
    """Started when the engines of `merged` have ended: one that ends takes vLLM's groups along.
    A crowd does not fit into its pages."""
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "max_cpu_loras": 2}
    with engine(
        CHECKPOINT, enable_prefix_caching=True, max_num_seqs=16, blocks=20, **options
    ) as llm:
        yield llm


def request_for(name: str, adapters: dict[str, str]) -> LoRARequest | None:
    return None if name == "base" else LoRARequest(name, NAMES.index(name), adapters[name])


def ask(llm: LLM, adapters: dict[str, str], asked: list[tuple[str, int, int]]) -> list[Output]:
    """The answers to (adapter, prompt, depth) in one batch."""
    answers = llm.generate(
        [{"prompt_token_ids": prompts()[prompt]} for _, prompt, _ in asked],
        [greedy(TOKENS, DEPTHS[depth]) for _, _, depth in asked],
        lora_request=[request_for(name, adapters) for name, _, _ in asked],
        use_tqdm=False,
    )
    return [Output.of(answer.outputs[0]) for answer in answers]


def agree(what: object, got: Output, wanted: Output, depth: int) -> None:
    """The same tokens and depths; where a lossless token is drafted is the server's business."""
    lossless = DEPTHS[depth].get("exit_mode") == "lossless"
    depths = wanted.depths if lossless else got.depths
    assert_same(str(what), got.tokens, depths, wanted.tokens, wanted.depths)


def everything(seed: int) -> list[tuple[str, int, int]]:
    """Every adapter with every prompt and depth, shuffled."""
    asked = [(n, p, d) for n in NAMES for p in range(5) for d in range(len(DEPTHS))]
    random.Random(seed).shuffle(asked)
    return asked


@pytest.mark.parametrize("seed", [0, 1])
def test_a_crowd_of_adapters_answers_as_the_merged_weights(
    serving: LLM, adapters: dict[str, str], merged: dict[str, list[list[Output]]], seed: int
) -> None:
    """The second time most prompts come out of the prefix cache: each from its own adapter's."""
    asked, preempted = everything(seed), count_preemptions(serving)
    for (name, prompt, depth), got in zip(asked, ask(serving, adapters, asked), strict=True):
        agree((name, prompt, depth), got, merged[name][depth][prompt], depth)
    assert preempted, "the pool is large enough for all"
    assert_idle(serving)


def test_one_adapter_alone_answers_as_in_the_crowd(
    serving: LLM, adapters: dict[str, str], merged: dict[str, list[list[Output]]]
) -> None:
    for name in NAMES:
        (got,) = ask(serving, adapters, [(name, 1, 1)])
        agree(name, got, merged[name][1][1], 1)


def test_the_prefix_cache_keeps_adapters_apart(serving: LLM, adapters: dict[str, str]) -> None:
    assert serving.reset_prefix_cache()

    def hit(name: str) -> int:
        answer = serving.generate(
            {"prompt_token_ids": prompts()[4]},
            greedy(1, DEPTHS[0]),
            lora_request=request_for(name, adapters),
            use_tqdm=False,
        )[0]
        return answer.num_cached_tokens or 0

    assert [hit(name) for name in NAMES] == [0, 0, 0]
    assert [hit(name) for name in NAMES] == [64, 64, 64]


def test_adapters_give_up_their_places_to_others(
    serving: LLM, adapters: dict[str, str], merged: dict[str, list[list[Output]]]
) -> None:
    """Four adapters for two slots."""
    asked = []
    for number in range(1, 5):
        name = NAMES[1 + number % 2]
        asked.append((LoRARequest(f"copy {number}", 10 + number, adapters[name]), name))
    answers = serving.generate(
        [{"prompt_token_ids": prompts()[0]}] * 4,
        greedy(TOKENS, DEPTHS[1]),
        lora_request=[request for request, _ in asked],
        use_tqdm=False,
    )
    for answer, (_, name) in zip(answers, asked, strict=True):
        agree(name, Output.of(answer.outputs[0]), merged[name][1][0], 1)


def test_an_adapter_may_hold_nothing_but_a_gate(
    serving: LLM, merged: dict[str, list[list[Output]]], tmp_path: Any
) -> None:
    """One that never says that a loop suffices: every threshold is full depth then."""
    never = torch.zeros(1, 128), torch.tensor([-50.0])
    folder = write_adapter(tmp_path / "a", CHECKPOINT, seed=3, targets=(), gate=never)
    (answer,) = serving.generate(
        {"prompt_token_ids": prompts()[0]},
        greedy(TOKENS, DEPTHS[1]),
        lora_request=LoRARequest("never", 52, folder),
        use_tqdm=False,
    )
    agree("never", Output.of(answer.outputs[0]), merged["base"][0][0], 0)


def test_an_adapter_of_what_is_not_adapted_is_refused(serving: LLM, tmp_path: Any) -> None:
    wrong = write_adapter(tmp_path / "a", CHECKPOINT, seed=3, targets=("q_proj", "lm_head"))
    with pytest.raises(Exception, match="lm_head"):
        serving.llm_engine.add_lora(LoRARequest("wrong", 50, wrong))


def test_a_gate_of_another_shape_is_refused(serving: LLM, tmp_path: Any) -> None:
    wrong = write_adapter(tmp_path / "a", CHECKPOINT, seed=3, gate=random_gate(127, seed=3))
    with pytest.raises(Exception, match=r"early_exit_gate.weight is \(1, 127\), not \(1, 128\)"):
        serving.llm_engine.add_lora(LoRARequest("wrong", 51, wrong))


def test_a_layer_of_another_shape_is_refused_and_leaves_nothing(
    serving: LLM, tmp_path: Any
) -> None:
    wrong = write_adapter(tmp_path / "a", CHECKPOINT, seed=3)
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 5}))
    with pytest.raises(Exception, match=r"lora_A.weight is \(4, \d+\), not \(5, \d+\)"):
        serving.llm_engine.add_lora(LoRARequest("wrong", 53, wrong))
    assert 53 not in serving.llm_engine.list_loras()


def test_one_loaded_anew_under_its_name_runs_beside_the_old(
    serving: LLM,
    adapters: dict[str, str],
    merged: dict[str, list[list[Output]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A third one, loaded meanwhile, takes no place that a running request needs; and no step reads
    an adapter's files because it once replaced another."""
    running, names = serving.llm_engine, ("all", "attention")
    answers: dict[str, Output] = {}
    read: list[Any] = []
    for number, name in enumerate(names):
        request = LoRARequest("same", 60 + number, adapters[name], load_inplace=True)
        running.add_lora(request)
        prompt = {"prompt_token_ids": prompts()[0]}
        running.add_request(name, prompt, greedy(TOKENS, DEPTHS[1]), lora_request=request)
    monkeypatch.setattr(runner_of(serving).lora_manager, "_load_adapter", read.append)
    running.step()
    assert read == []
    monkeypatch.undo()
    running.add_lora(LoRARequest("third", 62, adapters["all"]))
    while running.has_unfinished_requests():
        answers |= {a.request_id: Output.of(a.outputs[0]) for a in running.step()}
    for name in names:
        agree(name, answers[name], merged[name][1][0], 1)


def test_one_whose_files_are_gone_ends_its_requests_and_nothing_else(
    serving: LLM,
    adapters: dict[str, str],
    merged: dict[str, list[list[Output]]],
    tmp_path: Any,
) -> None:
    """It gave its place to others. In the same batch others answer; when the files are back it does
    too, and the prefix cache has nothing of what the failed request computed without it."""
    folder, prompt = tmp_path / "a", prompts()[4]
    shutil.copytree(adapters["all"], folder)
    gone = LoRARequest("gone", 70, str(folder))

    def ask_for(*requests: LoRARequest | None) -> list[Any]:
        asked = [{"prompt_token_ids": prompt}] * len(requests)
        params = greedy(TOKENS, DEPTHS[1])
        answers = serving.generate(asked, params, lora_request=list(requests), use_tqdm=False)
        return [answer.outputs[0] for answer in answers]

    others = [LoRARequest(f"other {n}", 71 + n, adapters["attention"]) for n in range(2)]
    assert ask_for(gone)[0].finish_reason == "length"
    ask_for(*others)
    folder.rename(tmp_path / "b")
    assert serving.reset_prefix_cache()
    failed, *answers = ask_for(gone, others[1], None, gone)
    for output in (failed, answers.pop()):
        assert (output.finish_reason, list(output.token_ids)) == ("error", [])
        assert output.stop_reason.startswith("LoRA adapter 'gone' cannot be loaded: ")
        assert str(folder) in output.stop_reason
    for output, name in zip(answers, ("attention", "base"), strict=True):
        agree(name, Output.of(output), merged[name][1][4], 1)
    assert_idle(serving)
    (tmp_path / "b").rename(folder)
    for _ in range(2):
        agree("all", Output.of(ask_for(gone)[0]), merged["all"][1][4], 1)


def test_an_id_of_its_own_has_a_prefix_cache_of_its_own(
    serving: LLM,
    adapters: dict[str, str],
    merged: dict[str, list[list[Output]]],
    tmp_path: Any,
) -> None:
    """Name and folder are those of another, whose files were other ones."""
    for number, name in enumerate(("all", "attention")):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.copytree(adapters[name], tmp_path / "a")
        request = LoRARequest("changing", 80 + number, str(tmp_path / "a"))
        for cached in (0, 64):
            (answer,) = serving.generate(
                {"prompt_token_ids": prompts()[4]},
                greedy(TOKENS, DEPTHS[1]),
                lora_request=request,
                use_tqdm=False,
            )
            assert answer.num_cached_tokens == cached
            agree(name, Output.of(answer.outputs[0]), merged[name][1][4], 1)


def test_a_gate_that_is_only_spoken_of_is_refused(serving: LLM, tmp_path: Any) -> None:
    """Its requests would leave where the model's says."""
    wrong = write_adapter(tmp_path / "a", CHECKPOINT, seed=3)
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": [GATE]}))
    said = r"modules_to_save\), but there is no model.early_exit_gate.weight in it"
    with pytest.raises(Exception, match=said):
        serving.llm_engine.add_lora(LoRARequest("wrong", 54, wrong))
    assert 54 not in serving.llm_engine.list_loras()
