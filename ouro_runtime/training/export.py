"""Reading and writing checkpoints in the released Ouro format."""

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from ouro_runtime.training.model import LoopLM, LoopLMConfig
from ouro_runtime.training.tokenizer import save_tokenizer


def config_json(cfg: LoopLMConfig) -> dict[str, object]:
    """`config.json` with the keys of the released checkpoints."""
    return {
        "architectures": ["OuroForCausalLM"],
        "model_type": "ouro",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_position_embeddings,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None,
        "total_ut_steps": cfg.loops,
        "early_exit_threshold": 1.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": cfg.num_layers,
        "layer_types": ["full_attention"] * cfg.num_layers,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }


def export(model: LoopLM, tok: Tokenizer, folder: Path) -> None:
    """Write a checkpoint folder, file by file atomically; other files in it are left alone.

    Tensors are float32, so that what is served is what was trained, to the bit."""
    cfg = model.cfg
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        part = Path(name)
        tensors = {n: p.detach().cpu().contiguous() for n, p in model.state_dict().items()}
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        (part / "config.json").write_text(json.dumps(config_json(cfg), indent=2) + "\n")
        generation = {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 0}
        (part / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        save_tokenizer(tok, part, cfg.max_position_embeddings)
        for file in part.iterdir():
            # A rename keeps the temporary file's private mode; a checkpoint is for everyone.
            file.chmod(0o644)
            os.replace(file, folder / file.name)


def read_config(folder: Path) -> LoopLMConfig:
    """The shapes in a checkpoint's `config.json`; grouped K/V heads are not supported here."""
    c = json.loads((folder / "config.json").read_text())
    if c["num_key_value_heads"] != c["num_attention_heads"]:
        raise ValueError(f"num_key_value_heads: {c['num_key_value_heads']}, must equal the heads")
    return LoopLMConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        loops=c["total_ut_steps"],
        rope_theta=c["rope_theta"],
        rms_norm_eps=c["rms_norm_eps"],
        max_position_embeddings=c["max_position_embeddings"],
    )


def load(folder: Path) -> tuple[LoopLM, Tokenizer]:
    """The model, in float32 and ready to evaluate, and the tokenizer of a checkpoint folder."""
    model = LoopLM(read_config(folder))
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({n: t.to(torch.float32) for n, t in tensors.items()})
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
