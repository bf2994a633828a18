"""A checkpoint is right, or refused with one message that says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.random_checkpoint import PRESETS, write_checkpoint
from ouro_runtime.checkpoint_config import OuroConfig
from ouro_runtime.config import LoopConfig
from ouro_runtime.model.checkpoint import CheckpointError, Sizes, check_checkpoint

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 32,
    "dtype": "float32",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A right checkpoint, to be broken."""
    return write_checkpoint(tmp_path / "model", **SMALL)


def set_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; `...` removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def set_tensors(folder: Path, **changes: Any) -> None:
    """Change tensors, `__` standing for the dot; `...` removes one."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.update({name.replace("__", "."): value for name, value in changes.items()})
    save_file({name: value for name, value in tensors.items() if value is not ...}, file)


def refusal(folder: Path) -> str:
    """The message a wrong checkpoint is refused with; one line that names the folder."""
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["t4-mha", "t6-gqa"])
def test_golden_checkpoints_are_right(name: str) -> None:
    check_checkpoint(GOLDEN / name)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_key_value_heads": 2},
        {"head_dim": 8},
        {"num_key_value_heads": 1, "head_dim": 12, "total_ut_steps": 1},
        {"tie_word_embeddings": True},
        {"dtype": "bfloat16"},
        {"shard_bytes": 2000},
    ],
    ids=lambda shape: ",".join(shape) or "plain",
)
def test_right_checkpoints_pass(tmp_path: Path, shape: dict[str, Any]) -> None:
    check_checkpoint(write_checkpoint(tmp_path, **{**SMALL, **shape}))


def test_path_may_be_a_string(folder: Path) -> None:
    check_checkpoint(str(folder))


def test_head_dim_may_follow_from_the_hidden_size(folder: Path) -> None:
    set_config(folder, head_dim=...)
    check_checkpoint(folder)


def test_null_kv_heads_means_as_many_as_heads(folder: Path) -> None:
    set_config(folder, num_key_value_heads=None)
    check_checkpoint(folder)


def test_tied_checkpoint_may_carry_its_head(folder: Path) -> None:
    set_config(folder, tie_word_embeddings=True)
    check_checkpoint(folder)


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_unreadable_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("kind", ["llama", None, ...])
def test_other_model_type(folder: Path, kind: Any) -> None:
    set_config(folder, model_type=kind)
    assert "model_type" in refusal(folder)


def test_other_architecture(folder: Path) -> None:
    set_config(folder, architectures=["OuroModel"])
    assert "['OuroModel']" in refusal(folder)


@pytest.mark.parametrize("loops", [0, -1, 1.5, "4", True, None, ...])
def test_loops_must_be_one_or_more(folder: Path, loops: Any) -> None:
    set_config(folder, total_ut_steps=loops)
    assert "total_ut_steps" in refusal(folder)


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
@pytest.mark.parametrize("value", [0, "8", ...])
def test_sizes_must_be_numbers(folder: Path, key: str, value: Any) -> None:
    set_config(folder, **{key: value})
    assert key in refusal(folder)


def test_heads_must_divide(folder: Path) -> None:
    set_config(folder, num_key_value_heads=3)
    assert "num_key_value_heads 3" in refusal(folder)
    set_config(folder, num_key_value_heads=1, num_attention_heads=5, head_dim=...)
    assert "has no head_dim" in refusal(folder)


def test_missing_tensor_is_named(folder: Path) -> None:
    set_tensors(folder, model__early_exit_gate__bias=...)
    assert "missing: model.early_exit_gate.bias" in refusal(folder)


def test_missing_head_is_named_unless_tied(folder: Path) -> None:
    set_tensors(folder, lm_head__weight=...)
    assert "missing: lm_head.weight" in refusal(folder)
    set_config(folder, tie_word_embeddings=True)
    check_checkpoint(folder)


def test_extra_tensor_is_named(folder: Path) -> None:
    set_tensors(folder, model__layers__0__self_attn__q_proj__bias=np.zeros(16, np.float32))
    message = refusal(folder)
    assert "not part of the model: model.layers.0.self_attn.q_proj.bias" in message


def test_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    set_tensors(folder, model__norm__weight=np.zeros(17, np.float32))
    assert "model.norm.weight is [17] and should be [16]" in refusal(folder)


def test_integers_are_no_weights(folder: Path) -> None:
    set_tensors(folder, model__norm__weight=np.zeros(16, np.int64))
    assert "model.norm.weight is I64" in refusal(folder)


def test_every_kind_of_fault_is_in_the_one_message_and_long_lists_are_cut(folder: Path) -> None:
    set_config(folder, num_hidden_layers=3)
    set_tensors(folder, extra=np.zeros(1, np.float32), model__norm__weight=np.zeros(17, np.float32))
    message = refusal(folder)
    assert "num_hidden_layers 3" in message
    assert "and 8 more" in message  # 11 tensors of the third layer, 3 of them named
    assert "not part of the model: extra" in message
    assert "should be [16]" in message


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no *.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"\0" * 8],
)
def test_file_that_is_no_safetensors(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors is not a safetensors file" in refusal(folder)


def test_file_that_breaks_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "breaks off" in refusal(folder)


def test_sharded_checkpoint_with_a_missing_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, **SMALL, shard_bytes=2000)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    assert lost.name in refusal(folder)


def test_sharded_checkpoint_whose_index_is_wrong(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, **SMALL, shard_bytes=2000)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first = sorted(folder.glob("*.safetensors"))[0].name
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = first
    file.write_text(json.dumps(index))
    assert "model.layers.9.mlp.up_proj.weight" in refusal(folder)
    file.write_text("{}")
    assert "no weight_map" in refusal(folder)


def test_same_tensor_in_two_files(folder: Path) -> None:
    save_file({"lm_head.weight": np.zeros((32, 16), np.float32)}, folder / "more.safetensors")
    assert "lm_head.weight is in" in refusal(folder)


def test_quantized_layers_are_checked_by_name(folder: Path) -> None:
    layer = "model__layers__0__mlp__up_proj"
    quantized = {
        f"{layer}__weight": ...,
        f"{layer}__weight_packed": np.zeros((24, 2), np.int32),
        f"{layer}__weight_scale": np.zeros((24, 1), np.float32),
    }
    set_tensors(folder, **quantized)
    assert "up_proj" in refusal(folder)
    set_config(folder, quantization_config={"quant_method": "compressed-tensors"})
    check_checkpoint(folder)
    set_tensors(folder, **{f"{layer}__weight_packed": ..., f"{layer}__weight_scale": ...})
    assert "missing: model.layers.0.mlp.up_proj.weight" in refusal(folder)


RELEASED = {
    "architectures": ["OuroForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_ouro.OuroConfig",
        "AutoModel": "modeling_ouro.OuroModel",
        "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
    },
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "early_exit_threshold": 1.0,
    "eos_token_id": 0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 65536,
    "model_type": "ouro",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "total_ut_steps": 4,
    "transformers_version": "4.55.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 49152,
}
"""The keys and the places of the released files; four variants differ in layers and ids."""


@pytest.mark.parametrize("layers", [24, 48])
@pytest.mark.parametrize("ids", [(0, 0), (1, 2)], ids=["base", "thinking"])
def test_released_config_loads_as_it_is(
    tmp_path: Path, layers: int, ids: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("auto_map was followed")

    monkeypatch.setattr("transformers.dynamic_module_utils.get_cached_module_file", no_network)
    bos, eos = ids
    content = {
        **RELEASED,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "max_window_layers": layers,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    (tmp_path / "config.json").write_text(json.dumps(content))

    config = OuroConfig.from_pretrained(tmp_path)

    assert config.num_hidden_layers == layers
    assert (config.bos_token_id, config.eos_token_id) == ids
    assert getattr(config, "pad_token_id", None) is None
    assert config.rope_parameters["rope_theta"] == 1000000.0
    assert config.rope_parameters["rope_type"] == "default"
    assert str(config.dtype) == "torch.bfloat16"
    assert getattr(config, "auto_map", None) is None
    loops = LoopConfig.parse(config)
    assert (loops.loops, loops.defaults.exit_threshold) == (4, 1.0)


@pytest.mark.parametrize(("layers", "parameters"), [(24, 1_434_652_673), (48, 2_667_974_657)])
def test_tensor_list_adds_up_to_the_released_models(layers: int, parameters: int) -> None:
    sizes = Sizes.of({**RELEASED, "num_hidden_layers": layers})
    assert sum(int(np.prod(shape)) for shape in sizes.tensors().values()) == parameters


def test_random_preset_is_the_released_shape() -> None:
    assert {key: RELEASED[key] for key in PRESETS["ouro-1.4b"]} == PRESETS["ouro-1.4b"]


def test_random_checkpoint_follows_from_its_seed_alone(tmp_path: Path) -> None:
    def read(folder: Path) -> dict[str, np.ndarray]:
        files = sorted(folder.glob("*.safetensors"))
        return {k: v for file in files for k, v in load_file(file).items()}

    whole = read(write_checkpoint(tmp_path / "whole", **SMALL))
    split = read(write_checkpoint(tmp_path / "split", **SMALL, shard_bytes=2000))
    other = read(write_checkpoint(tmp_path / "other", **SMALL, seed=1))
    assert whole.keys() == split.keys()
    assert all(np.array_equal(whole[name], split[name]) for name in whole)
    name = "model.layers.1.mlp.down_proj.weight"
    assert not np.array_equal(whole[name], other[name])


def test_random_bfloat16_is_the_rounded_float32(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    exact = load_torch(write_checkpoint(tmp_path / "a", **SMALL) / "model.safetensors")
    short = {**SMALL, "dtype": "bfloat16"}
    rounded = load_torch(write_checkpoint(tmp_path / "b", **short) / "model.safetensors")
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor.to(torch.bfloat16)), name


def test_tokenizer_is_copied_on_request(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors").write_text("not this")
    folder = write_checkpoint(tmp_path / "model", **SMALL, tokenizer=source)
    assert (folder / "tokenizer.json").read_text() == "{}"
    check_checkpoint(folder)
