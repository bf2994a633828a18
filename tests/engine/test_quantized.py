"""Quantized checkpoints in the engine: they load, and every mode keeps its word on them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from vllm import LLM
from vllm.lora.request import LoRARequest

from ouro_runtime.model.checkpoint import check_checkpoint
from ouro_runtime.model.quantize import main
from ouro_runtime.model.quantized import has_four_bits, overflows
from ouro_runtime.training.evaluate import prompts_of, score, suite
from ouro_server.checkpoint import shipped
from tests.engine.adapters import ALL, GATE, write_adapter
from tests.engine.harness import (
    Output,
    assert_idle,
    engine,
    generate,
    generate_one,
    greedy,
    scheduler_of,
)
from tests.engine.quantized import FORMATS, repack

LOOPS = 4
PROBLEMS = 4
"""Of each family and difficulty."""

EIGHT, FOUR = "w8a8", ("w4a16", *FORMATS)
FULL: dict[str, Any] = {"exit_threshold": 1.0, "exit_mode": "skip"}
EARLY: dict[str, dict[str, Any]] = {
    mode: {"exit_threshold": 0.5, "exit_mode": mode} for mode in ("skip", "exact", "lossless")
}


def checkpoint(name: str, folder: Path) -> Path:
    options = ["--format", "w8a8", "--narrow"] if name == EIGHT else ["--format", "w4a16"]
    made = folder / options[1]
    assert main([str(shipped()), str(made), *options]) == 0
    return repack(made, folder / name, name) if name in FORMATS else made


@pytest.fixture(scope="module", params=[EIGHT, *FOUR])
def name(request: pytest.FixtureRequest) -> str:
    if request.param in FOUR and not has_four_bits():
        pytest.skip("vLLM has no kernel for 4-bit weights on this processor")
    if request.param in FOUR and not os.environ.get("OURO_TEST_FOUR_BITS"):
        pytest.skip("not seen to pass with vLLM's kernel yet; OURO_TEST_FOUR_BITS=1 runs it")
    return request.param


@pytest.fixture(scope="module")
def llm(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = checkpoint(name, tmp_path_factory.mktemp("quantized"))
    check_checkpoint(folder)
    dtype = "float32" if name == EIGHT else "bfloat16"
    with engine(str(folder), dtype=dtype, max_model_len=512) as llm:
        scheduler_of(llm).draft_trial = None
        yield llm


def test_every_mode_answers_nearly_as_the_checkpoint_itself(llm: LLM, name: str) -> None:
    """Which is right on 98 % of these; and its gate says when, as before."""
    tok = Tokenizer.from_file(str(shipped() / "tokenizer.json"))
    problems = [problem for drawn in suite(PROBLEMS).values() for problem in drawn]
    prompts, ends = prompts_of(problems, tok), {"ignore_eos": False, "stop_token_ids": [0, 2]}
    params = {"full": greedy(24, FULL, **ends)}
    params |= {mode: greedy(24, depth, **ends) for mode, depth in EARLY.items()}
    for mode, asked in params.items():
        outs = generate(llm, prompts, [asked] * len(prompts))
        found = score(
            problems, [out.tokens for out in outs], [out.depths for out in outs], tok, LOOPS
        )
        assert found.accuracy > (93 if name == EIGHT else 85), mode
        if mode in ("skip", "exact"):
            assert 1.4 < found.depth < 2.2, mode
    assert_idle(llm)


def test_lossless_says_what_full_depth_says(llm: LLM, name: str) -> None:
    if name != EIGHT:
        pytest.skip("in 16 bits, ties fall as the rows of a pass are")
    prompts = [[7 + i, 100, 30 + 5 * i] for i in range(6)]
    wanted = generate(llm, prompts, greedy(20, FULL))
    for draft in (EARLY["lossless"], {"exit_mode": "lossless", "forced_depths": [2]}):
        outs = generate(llm, prompts, greedy(20, draft))
        assert [out.tokens for out in outs] == [out.tokens for out in wanted]
        assert any(any(out.drafts) for out in outs)


def test_a_crowd_changes_nothing(llm: LLM, name: str) -> None:
    if name != EIGHT:
        pytest.skip("in 16 bits, ties fall as the rows of a pass are")
    prompts = [[5 + i, 90, 40 + 3 * i] for i in range(6)]
    asked = [greedy(12, depth) for depth in 2 * list(EARLY.values())]
    together = generate(llm, prompts, asked)
    for prompt, params, out in zip(prompts, asked, together, strict=True):
        alone = generate_one(llm, prompt, params)
        assert alone.tokens == out.tokens and alone.loops_run == out.loops_run


def test_adapters_change_a_quantized_checkpoint_too(tmp_path: Path) -> None:
    """Its request alone, and beside one without an adapter."""
    adapter = write_adapter(tmp_path / "a", str(shipped()), seed=0, targets=(*ALL, GATE))
    lora, prompt = LoRARequest("a", 1, adapter), {"prompt_token_ids": [5, 90, 40]}
    asked = greedy(8, EARLY["skip"])
    options = {"enable_lora": True, "max_lora_rank": 8, "max_model_len": 64}
    with engine(str(checkpoint(EIGHT, tmp_path)), **options) as llm:
        answers = [
            [
                Output.of(answer.outputs[0]).tokens
                for answer in llm.generate(
                    [prompt] * len(loras), asked, lora_request=loras, use_tqdm=False
                )
            ]
            for loras in ([None, lora], [lora])
        ]
    (plain, crowd), (alone,) = answers
    assert alone == crowd != plain


def test_what_this_processor_cannot_run_is_refused(tmp_path: Path) -> None:
    """With full-range 8-bit weights where sums overflow, and 4 bits where there is no kernel."""
    cases = {"w8a8": (overflows(), "need VNNI"), "w4a16": (not has_four_bits(), "need AVX-512")}
    if not any(cannot for cannot, _ in cases.values()):
        pytest.skip("this processor runs them all")
    for name, (cannot, reason) in cases.items():
        if cannot:
            assert main([str(shipped()), str(tmp_path / name), "--format", name]) == 0
            with pytest.raises((ValueError, RuntimeError), match=reason):  # noqa: SIM117
                with engine(str(tmp_path / name), dtype="auto"):
                    pass
