"""A quantized checkpoint: the released layout, rounded layers, and all else bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ouro_runtime.model import quantize
from ouro_runtime.model.checkpoint import (
    INDEX,
    NARROW,
    Sizes,
    check_checkpoint,
    read_json,
    weight_files,
)
from ouro_runtime.model.quantize import main, unpacked
from ouro_server.checkpoint import shipped
from tests.docs.blocks import ALL
from tests.engine.checkpoints import write_random

LINEARS = Sizes.of(read_json(shipped() / "config.json")).linears()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in weight_files(folder) for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("options", "step"),
    [
        (("--format", "w8a8"), 127.5),
        (("--format", "w8a8", "--narrow"), NARROW),
        (("--format", "w4a16"), 7.5),
        (("--format", "w4a16", "--group-size", "64"), 7.5),
    ],
    ids=["w8a8", "w8a8-narrow", "w4a16", "w4a16-64"],
)
def test_layers_are_rounded_and_all_else_is_kept(
    tmp_path: Path, options: tuple[str, ...], step: float
) -> None:
    assert main([str(shipped()), str(tmp_path), *options]) == 0
    check_checkpoint(tmp_path)
    before, after = tensors(shipped()), tensors(tmp_path)
    for name in before:
        if name.rpartition(".")[0] not in LINEARS:
            assert torch.equal(before[name], after[name]), name
    group = int(options[-1]) if options[-1].isdigit() else 32
    rounded = unpacked(tmp_path)
    assert rounded.keys() == before.keys()
    for layer in LINEARS:
        weight = before[f"{layer}.weight"]
        groups = weight.view(len(weight), -1, group if options[1] == "w4a16" else weight.shape[1])
        # Half a step of the largest weight's group; the largest positive one may lose a whole step.
        limit = groups.abs().amax(2, keepdim=True) / step
        off = (rounded[f"{layer}.weight"].view_as(groups) - groups).abs()
        assert (off <= 1.01 * limit).all() and (off <= 0.51 * limit).float().mean() > 0.9, layer
    if "--narrow" in options:
        for layer in LINEARS:
            assert after[f"{layer}.weight"].abs().max() <= NARROW


def test_what_lies_beside_the_weights_is_kept(tmp_path: Path) -> None:
    assert main([str(shipped()), str(tmp_path), "--format", "w4a16"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {f.name for f in shipped().iterdir()}
    config, released = read_json(tmp_path / "config.json"), read_json(shipped() / "config.json")
    said = config.pop("quantization_config")
    assert said["ignore"] == ["lm_head", "model.early_exit_gate"]
    # The kernels compute in 16 bits, whatever the checkpoint was stored in.
    assert config == released | {"torch_dtype": "bfloat16"}


def test_shards_stay_shards(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write_random(source, loops=4, heads=2, kv_heads=2, head_dim=32)
    stored = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(stored)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: stored[name] for name in names if places[name] == file}
        save_file(part, source / file, {"format": "pt"})
    (source / INDEX).write_text(json.dumps({"weight_map": places}))
    assert main([str(source), str(target), "--format", "w8a8"]) == 0
    check_checkpoint(target)
    assert len(weight_files(target)) == 2


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_quantized_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, full = tmp_path / "done", tmp_path / "full"
    assert "no such folder" in refused(capsys, tmp_path / "none", done, "--format", "w8a8")
    odd = write_random(tmp_path / "odd", loops=4, heads=1, kv_heads=1, head_dim=32)
    line = refused(capsys, odd, done, "--format", "w4a16", "--group-size", "64")
    assert "self_attn.o_proj has 32 inputs, no multiple of --group-size 64" in line
    assert main([str(shipped()), str(done), "--format", "w8a8"]) == 0
    assert "quantized already" in refused(capsys, done, full, "--format", "w8a8")
    assert "is not empty" in refused(capsys, shipped(), done, "--format", "w8a8")


def test_a_source_that_is_no_checkpoint_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text(json.dumps({"model_type": "llama"}))
    line = refused(capsys, tmp_path / "source", tmp_path / "target", "--format", "w8a8")
    assert "'llama'" in line and not (tmp_path / "target").exists()


def test_narrow_is_for_eight_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(shipped()), str(tmp_path), "--format", "w4a16", "--narrow"])
    assert "--narrow is for --format w8a8" in capsys.readouterr().err


def test_the_documented_command_is_this_one() -> None:
    (command,) = (c for c in ALL if "ouro_runtime.model.quantize" in c.words)
    python, _, module, *arguments = command.words
    assert (python, module) == ("python", quantize.__name__)
    quantize.build_parser().parse_args(arguments)


def test_scales_are_stored_as_the_weights_were(tmp_path: Path) -> None:
    assert main([str(shipped()), str(tmp_path), "--format", "w8a8"]) == 0
    scales = [t for name, t in tensors(tmp_path).items() if name.endswith("weight_scale")]
    assert len(scales) == len(LINEARS) and {t.dtype for t in scales} == {torch.float32}
