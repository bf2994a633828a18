"""`ouro-serve`: help, what it refuses before anything is loaded, and what it hands to vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ouro_runtime.config import DepthError
from ouro_server import checkpoint, cli, command, launch, settings
from tests.server.fakes import LOOPS

CONFIG = {
    "architectures": ["OuroForCausalLM"],
    "model_type": "ouro",
    "vocab_size": 64,
    "intermediate_size": 96,
    "total_ut_steps": LOOPS,
    "early_exit_threshold": 0.75,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that `ouro-serve` refuses a command line with."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ouro-serve: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--exit-threshold", "1.5"),
        ("--exit-threshold", "-1"),
        ("--exit-threshold", "nan"),
        ("--exit-threshold", "inf"),
        ("--exit-threshold", "half"),
        ("--exit-threshold", ""),
        ("--exit-mode", "full"),
        ("--min-loops", "0"),
        ("--min-loops", "5"),
        ("--min-loops", "1.5"),
        ("--max-loops", "5"),
        ("--max-loops", "true"),
    ],
)
def test_a_bad_depth_option_is_named(
    option: str, value: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert option in refused([str(folder), f"{option}={value}"], capsys)
    underscored = "--" + option[2:].replace("-", "_")
    assert option in refused([f"{underscored}={value}", "--model", str(folder)], capsys)


def test_min_above_max_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(folder), "--min-loops", "3", "--max-loops", "2"]
    assert "--min-loops (3) must not exceed" in refused(argv, capsys)


def test_a_bad_presets_file_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "presets.yaml"
    argv = [str(folder), "--presets", str(file)]
    assert f"{file}: cannot be read" in refused(argv, capsys)
    file.write_text("presets: {deep: {max_loops: 5}}")
    expected = f"{file}: preset 'deep': max_loops must be an integer from 1 to 4, got 5"
    assert expected in refused(argv, capsys)
    assert expected in refused([f"--presets={file}", "--model", str(folder)], capsys)


def test_a_wrong_folder_is_refused_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such folder" in refused([str(tmp_path / "none")], capsys)
    assert "no config.json" in refused([str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in refused([str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type is 'llama'" in refused([str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text('{"model_type": "ouro", "total_ut_steps": 0}')
    assert "total_ut_steps" in refused([str(tmp_path)], capsys)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("hidden_act", "nope", "'silu'"),
        ("total_ut_steps", 64, "an integer from 1 to 63"),
        ("torch_dtype", "float99", "one of bfloat16, float16, float32"),
        ("rope_scaling", {"type": "x"}, "one of default, linear"),
        ("num_hidden_layers", "x", "an integer of 1 or more"),
    ],
)
def test_a_wrong_field_of_config_json_is_refused_before_vllm_is_imported(
    name: str,
    value: object,
    allowed: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # `_serve` is what imports it.
    monkeypatch.setattr(command, "_serve", None)
    file = folder / "config.json"
    file.write_text(json.dumps(CONFIG | {name: value}))
    said = refused([str(folder)], capsys)
    for word in (str(folder), "config.json", name, allowed):
        assert word in said


def test_a_config_json_that_is_no_object_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("[]", "3", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        assert "config.json is not" in refused([str(tmp_path)], capsys)


def test_a_length_that_config_json_leaves_out_is_the_released_codes() -> None:
    given = CONFIG | {"max_position_embeddings": 32768}
    left_out = {k: v for k, v in CONFIG.items() if k != "max_position_embeddings"}
    assert checkpoint.full_request_bytes(left_out) == checkpoint.full_request_bytes(given)


@pytest.mark.parametrize("overrides", ["{bad", [1], {"total_ut_steps": 100}, {"rope_theta": "x"}])
def test_wrong_overrides_of_config_json_are_refused_by_name(overrides: object) -> None:
    with pytest.raises(checkpoint.RefusedError, match="--hf-overrides") as refusal:
        checkpoint.check_overrides(overrides)
    if isinstance(overrides, dict):
        assert next(iter(overrides)) in str(refusal.value)


def test_overrides_that_mean_something_pass() -> None:
    for overrides in ({}, {"total_ut_steps": 2}, {"unknown": 1}, lambda config: config):
        checkpoint.check_overrides(overrides)


@pytest.mark.parametrize("given", [[1], "{bad", 3, {"ouro": 3}, {"ouro": [1]}])
def test_an_additional_config_that_is_no_object_is_named(given: object) -> None:
    with pytest.raises(DepthError, match="--additional-config must be a JSON object"):
        settings.merge_additional_config(given, {})


def test_a_checkpoint_that_is_not_local_is_checked_as_far_as_possible() -> None:
    checkpoint.check_depth_defaults(None, {"exit_threshold": 0.5, "max_loops": 9})
    for wrong in ({"exit_threshold": 2}, {"exit_mode": "x"}, {"min_loops": 0}, {"loops": 1}):
        with pytest.raises(DepthError):
            checkpoint.check_depth_defaults(None, wrong)


def test_depth_options_become_numbers() -> None:
    argv = ["m", "--exit-threshold", "0.5", "--min_loops=2", "--max-loops", "3", "--port", "1"]
    options, rest = settings.depth_parser().parse_known_args(argv)
    assert settings.depth_settings(options) == {
        "exit_threshold": 0.5,
        "min_loops": 2,
        "max_loops": 3,
    }
    assert rest == ["m", "--port", "1"]


def test_options_join_the_users_additional_config() -> None:
    given = {"other": 1, "ouro": {"exit_threshold": 0.1, "min_loops": 2}}
    assert settings.merge_additional_config(given, {"exit_threshold": 0.5}) == {
        "other": 1,
        "ouro": {"exit_threshold": 0.5, "min_loops": 2},
    }
    assert settings.merge_additional_config(None, {}) == {"ouro": {}}


@pytest.mark.parametrize(
    ("argv", "model"),
    [
        ([], None),
        (["m", "--port", "1"], "m"),
        (["--port", "1", "--model", "m"], "m"),
        (["--model=m"], "m"),
        (["--port", "1"], None),
    ],
)
def test_the_model_is_found_on_the_command_line(argv: list[str], model: str | None) -> None:
    assert settings.guess_model(argv) == model


def test_only_a_line_of_options_alone_surely_names_no_model() -> None:
    assert settings.names_no_model([])
    assert settings.names_no_model(["--enforce-eager", "--port=1"])
    assert not settings.names_no_model(["--port", "1", "org/model"])
    assert not settings.names_no_model(["--config=file.yaml"])


def test_a_folder_is_found_behind_options(folder: Path) -> None:
    assert settings.guess_model(["--port", "1", str(folder)]) == str(folder)


def test_the_environment_gains_our_plugins_and_keeps_the_users() -> None:
    plugins = settings.environment({"VLLM_PLUGINS": "theirs,ouro"}, [], True)["VLLM_PLUGINS"]
    assert plugins == "theirs,ouro,ouro_depth,ouro_metrics"
    unset = settings.environment({}, [], True)["VLLM_PLUGINS"].split(",")
    assert set(settings.PLUGINS) <= set(unset)


def test_the_users_environment_stands() -> None:
    theirs = {
        "HF_HUB_OFFLINE": "0",
        "PYTHONWARNINGS": "default",
        "VLLM_LOGGING_LEVEL": "DEBUG",
        "TORCH_CPP_LOG_LEVEL": "INFO",
        "VLLM_NO_USAGE_STATS": "0",
    }
    assert settings.environment(theirs, [], True).keys() == {"VLLM_PLUGINS"}
    assert "VLLM_LOGGING_CONFIG_PATH" not in settings.environment({}, ["--log-level=INFO"], True)
    for option in ("--logits-processors", "--logprobs-mode"):
        assert "VLLM_LOGGING_CONFIG_PATH" in settings.environment({}, [option], True)


def test_hub_models_may_be_fetched() -> None:
    assert "HF_HUB_OFFLINE" not in settings.environment({}, [], local_model=False)
    assert settings.environment({}, [], local_model=True)["HF_HUB_OFFLINE"] == "1"


def test_the_logging_file_is_json() -> None:
    assert json.loads(settings.LOGGING.read_text())["version"] == 1


def test_the_kv_pool_has_room_for_full_requests_within_a_quarter_of_memory() -> None:
    per_token = 2 * LOOPS * 2 * 2 * 16 * 4
    big = CONFIG | {"max_position_embeddings": 2**20}
    wanted = checkpoint.FULL_REQUESTS * per_token * 2**20
    assert checkpoint.kv_pool_bytes(big, available=2**60) == wanted
    assert checkpoint.kv_pool_bytes(big, available=2**32) == 2**30
    assert checkpoint.kv_pool_bytes(CONFIG, available=2**60) == 2**28


def test_reasoning_needs_the_released_token_ids(tmp_path: Path) -> None:
    assert checkpoint.separates_reasoning("some/hub-id")
    assert not checkpoint.separates_reasoning(str(tmp_path))
    tokens = [{"content": "<think>", "id": 3}, {"content": "</think>", "id": 4}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    assert checkpoint.separates_reasoning(str(tmp_path))
    tokens[0]["id"] = 7
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    assert not checkpoint.separates_reasoning(str(tmp_path))


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ouro-serve` sets environment variables; this test's end unsets them."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.mark.usefixtures("environ")
def test_help_explains_depth_first_and_then_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    for option in ("--exit-threshold", "--exit-mode", "--min-loops", "--max-loops", "--presets"):
        assert option in out
    assert out.index("--max-loops") < out.index("ModelConfig")
    assert "--help=all" in out


@pytest.mark.usefixtures("environ")
def test_an_unknown_option_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([str(folder), "--exit-treshold", "1"])
    assert done.value.code == 2
    expected = "ouro-serve: error: unrecognized arguments: --exit-treshold 1\n"
    assert capsys.readouterr().err.endswith(expected)


@pytest.mark.usefixtures("environ")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--presets"], "argument --presets: expected one argument"),
        (["--kv-transfer-config", "{bad"], "argument --kv-transfer-config: Invalid JSON: key must"),
        (["--compilation-config", '{"modee": 1}'], "--compilation-config/-cc: modee: Unexpected"),
        (["--config", "/no/file.yaml"], "argument --config: /no/file.yaml: No such file"),
        (["--config", "file.txt"], "argument --config: "),
        (["--config"], "argument --config: "),
        (["--config", "a.yaml", "--config", "b.yaml"], "argument --config: More than one"),
        (["--config", "broken.yaml"], 'sequence in "broken.yaml", line 1, column 4'),
        (["--config", "list.yaml"], "argument --config: list.yaml must map options to values"),
    ],
)
def test_what_the_parsers_refuse_is_one_line_that_names_the_option(
    argv: list[str],
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    (folder / "broken.yaml").write_text("a: [1\nb: {")
    (folder / "list.yaml").write_text("- 1")
    (folder / "file.txt").write_text("port: 1")
    with pytest.raises(SystemExit) as done:
        cli.main([str(folder), *argv])
    assert done.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith("ouro-serve: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert "pydantic" not in err


@pytest.mark.usefixtures("environ")
def test_vllms_options_get_our_defaults_unless_chosen() -> None:
    args = launch.parse([])
    assert (args.host, args.port, args.served_model_name) == ("127.0.0.1", 8000, ["ouro-mini"])
    assert args.model == str(checkpoint.shipped())
    assert (args.enable_auto_tool_choice, args.tool_call_parser) == (True, "hermes")
    chosen = launch.parse(["some/model", "--host", "::1", "--no-enable-auto-tool-choice"])
    assert (chosen.model, chosen.host) == ("some/model", "::1")
    assert chosen.served_model_name is None
    assert not chosen.enable_auto_tool_choice


@pytest.mark.usefixtures("environ")
def test_the_shipped_checkpoint_has_its_name_unless_a_folder_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for argv in (["ouro-mini"], ["--model", "ouro-mini"]):
        args = launch.parse(argv)
        assert (args.model, args.served_model_name) == (str(checkpoint.shipped()), ["ouro-mini"])
        assert args.structured_outputs_config.backend == "xgrammar"
    assert launch.parse(["ouro-mini", "--served-model-name", "m"]).served_model_name == ["m"]
    assert checkpoint.locate("some/model") == "some/model"
    (tmp_path / "ouro-mini").mkdir()
    assert launch.parse(["ouro-mini"]).model == checkpoint.locate("ouro-mini") == "ouro-mini"
    assert launch.parse([]).model == str(checkpoint.shipped())


@pytest.mark.usefixtures("environ")
def test_what_depends_on_the_checkpoint_is_set_unless_chosen(folder: Path) -> None:
    args = launch.parse([str(folder)])
    launch.complete(args, {"max_loops": 2}, CONFIG)
    assert args.additional_config == {"ouro": {"max_loops": 2}}
    assert args.dtype == "float32"
    assert not args.reasoning_parser
    assert args.max_model_len is None

    args = launch.parse([str(folder), "--dtype", "bfloat16", "--reasoning-parser", "qwen3"])
    launch.complete(args, {}, CONFIG)
    assert (args.dtype, args.reasoning_parser) == ("bfloat16", "qwen3")


@pytest.mark.usefixtures("environ")
def test_a_length_that_memory_cannot_hold_is_fitted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(launch.KV_SPACE, raising=False)
    long = CONFIG | {"max_position_embeddings": 2**34}
    args = launch.parse([str(folder)])
    launch.complete(args, {}, long)
    assert args.max_model_len == launch.AUTO_LENGTH
    assert args.kv_cache_memory_bytes > 0
    args = launch.parse([str(folder), "--max-model-len", "64"])
    launch.complete(args, {}, long)
    assert args.max_model_len == 64


@pytest.mark.usefixtures("environ")
def test_what_the_engines_configuration_refuses_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusing(_: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(launch, "run", refusing)
    monkeypatch.setattr(checkpoint, "check_files", lambda *_: None)
    assert cli.main([str(folder)]) == 2
    assert capsys.readouterr().err == "ouro-serve: error: no such thing\n"
