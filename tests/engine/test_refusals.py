"""What cannot work is refused at start-up, and a bad request before it runs, with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm import LLM, EngineArgs, SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import BeamSearchParams

from ouro_runtime.config import DepthError
from ouro_runtime.engine.config_hook import UnsupportedError, refuse
from ouro_runtime.plugin import register
from tests.engine.cases import CHECKPOINTS, golden_cases
from tests.engine.compare import assert_case
from tests.engine.harness import assert_idle, engine, generate_one, greedy

CHECKPOINT = CHECKPOINTS["t4-mha"]
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "pipeline parallelism": {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
    "speculative decoding": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 2,
            "prompt_lookup_max": 3,
        }
    },
    "--fully-sharded-loras": {"enable_lora": True, "fully_sharded_loras": True},
    "fp8 K/V on CPU": {"kv_cache_dtype": "fp8"},
    "prompt embeddings": {"enable_prompt_embeds": True},
    "K/V transfer": {
        "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    },
}


def settings(**options: Any) -> EngineArgs:
    register()
    return EngineArgs(model=CHECKPOINT, dtype="float32", skip_tokenizer_init=True, **options)


@pytest.mark.parametrize("feature", UNSUPPORTED)
def test_an_unsupported_feature_is_refused_with_the_reason(feature: str) -> None:
    with pytest.raises(ValueError, match=f"Ouro Serve does not support {feature}: .{{20,}}"):
        settings(**UNSUPPORTED[feature]).create_engine_config()


@pytest.mark.parametrize("option", ["distributed_executor_backend", "data_parallel_backend"])
def test_ray_is_refused_on_cpu_where_vllm_has_no_device_for_it(option: str) -> None:
    """Set afterwards: without Ray installed vLLM's configuration asks for it before it asks us."""
    assert current_platform.ray_device_key == "", "vLLM's CPU platform knows Ray: try it"
    config = settings().create_engine_config()
    setattr(config.parallel_config, option, "ray")
    with pytest.raises(UnsupportedError, match=r"does not support Ray on CPU: .*no device"):
        refuse(config)


@pytest.mark.parametrize(
    ("ouro", "named"),
    [
        ({"exit_threshold": 1.5}, "exit_threshold"),
        ({"exit_threshold": "high"}, "exit_threshold"),
        ({"min_loops": 0}, "min_loops"),
        ({"max_loops": 5}, "max_loops"),
        ({"min_loops": 3, "max_loops": 2}, "min_loops"),
        ({"exit_mode": "split"}, "exit_mode"),
        ({"exit_rule": "entropy", "exit_threshold": 0.5}, "exit_rule"),
        ({"exit_rule": "margin"}, "exit_threshold"),
        ({"exit_treshold": 0.5}, "exit_treshold"),
    ],
)
def test_bad_server_defaults_are_refused_by_name(ouro: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        settings(additional_config={"ouro": ouro}).create_engine_config()


@pytest.mark.parametrize("wrong", [{"total_ut_steps": 64}, {"hidden_act": "gelu"}])
def test_overrides_of_the_checkpoint_are_held_to_its_rules(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"hf_overrides: {next(iter(wrong))} must be "):
        settings(hf_overrides=wrong).create_engine_config()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    defaults = {"exit_threshold": 0.3, "exit_mode": "skip"}
    with engine(CHECKPOINT, additional_config={"ouro": defaults}) as llm:
        yield llm


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"exit_threshold": -0.1}, "exit_threshold"),
        ({"exit_threshold": float("nan")}, "exit_threshold"),
        ({"exit_threshold": True}, "exit_threshold"),
        ({"min_loops": 5}, "min_loops"),
        ({"max_loops": 0}, "max_loops"),
        ({"max_loops": 2.0}, "max_loops"),
        ({"min_loops": 4, "max_loops": 1}, "min_loops"),
        ({"exit_mode": "full"}, "exit_mode"),
        ({"exit_rule": "delta", "exit_threshold": 2.5}, "exit_threshold"),
        ({"exit_rule": "delta"}, "exit_threshold"),
        ({"forced_depths": []}, "forced_depths"),
        ({"forced_depths": [1, 5]}, "forced_depths"),
    ],
)
def test_bad_depth_controls_are_refused_and_leave_nothing(
    llm: LLM, extra: dict[str, Any], named: str
) -> None:
    params = SamplingParams(max_tokens=4, extra_args=extra)
    with pytest.raises(DepthError) as caught:
        llm.generate({"prompt_token_ids": [5, 6]}, params, use_tqdm=False)
    assert caught.value.param == named
    assert named in str(caught.value)
    assert_idle(llm)


def test_a_priority_that_nobody_asks_for_is_refused(llm: LLM) -> None:
    """vLLM says so of its field, and takes it."""
    for priority in ([3], [-1]):
        with pytest.raises(DepthError, match="--scheduling-policy priority") as caught:
            llm.generate([{"prompt_token_ids": [5]}], greedy(1), priority=priority, use_tqdm=False)
        assert caught.value.param == "priority"
    assert_idle(llm)
    llm.generate([{"prompt_token_ids": [5]}], greedy(1), priority=[0], use_tqdm=False)


def test_a_watermark_that_nobody_makes_is_refused(llm: LLM) -> None:
    """vLLM would warn in the log; in a beam search, whose tokens are requests of their own, too."""
    with pytest.raises(DepthError, match="watermarking is not supported") as caught:
        generate_one(llm, [5], greedy(1, watermarking=True))
    assert caught.value.param == "watermarking"
    beams = BeamSearchParams(beam_width=2, max_tokens=1, watermarking=True)
    with pytest.raises(DepthError, match="watermarking is not supported"):
        llm.beam_search([{"prompt_token_ids": [5]}], beams)
    assert_idle(llm)
    generate_one(llm, [5], greedy(1, watermarking=False))


def test_the_servers_defaults_hold_where_a_request_says_nothing(llm: LLM) -> None:
    for case in golden_cases("t4-mha", ("skip",)):
        if case.threshold == 0.3:
            out = generate_one(llm, case.prompt, greedy(len(case.tokens)))
            assert_case(case, out.tokens, out.depths, out.logprobs)


def test_a_request_overrides_the_servers_defaults(llm: LLM) -> None:
    for case in golden_cases("t4-mha", ("full",)):
        out = generate_one(llm, case.prompt, greedy(len(case.tokens), {"exit_threshold": 1.0}))
        assert_case(case, out.tokens, out.depths, out.logprobs)
