"""Random checkpoints in the released format, small enough for a test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_random(
    folder: Path,
    *,
    loops: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    layers: int = 2,
    hidden: int = 64,
    vocab: int = 128,
    seed: int = 0,
) -> str:
    """Write `config.json` and `model.safetensors`; returns the folder as a string.

    Weights are scaled so that greedy decoding wanders and depths spread over 1..T.
    """
    generator = torch.Generator().manual_seed(seed)

    def linear(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.9 * columns**-0.5

    def norm() -> torch.Tensor:
        return 1 + 0.1 * torch.randn(hidden, generator=generator)

    inner = 2 * hidden
    tensors = {
        "model.embed_tokens.weight": torch.randn(vocab, hidden, generator=generator) * 0.1,
        "model.norm.weight": norm(),
        "model.early_exit_gate.weight": 1.5 * linear(1, hidden),
        "model.early_exit_gate.bias": torch.tensor([-0.8]),
        "lm_head.weight": linear(vocab, hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for name, shape in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = linear(*shape)
        for name in ("input_layernorm", "input_layernorm_2"):
            tensors[f"{prefix}.{name}.weight"] = norm()
        for name in ("post_attention_layernorm", "post_attention_layernorm_2"):
            tensors[f"{prefix}.{name}.weight"] = norm()
    config = {
        "architectures": ["OuroForCausalLM"],
        "model_type": "ouro",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "total_ut_steps": loops,
        "early_exit_threshold": 1.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
    return str(folder)


def with_byte_tokenizer(source: str, folder: Path, reasoning: bool = False) -> str:
    """Copy a checkpoint of vocabulary 256 and give it a tokenizer whose id is the byte.

    Bytes 0, 1 and 2 are the special tokens (pad, bos, eos); with `reasoning` 3 and 4 are `<think>`
    and `</think>`, as in the released checkpoints.
    """
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    symbol = {byte: chr(byte) for byte in printable}
    symbol |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    names = {0: "<pad>", 1: "<bos>", 2: "<eos>"}
    if reasoning:
        names |= {3: "<think>", 4: "</think>"}
    special = [
        {
            "id": byte,
            "content": name,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for byte, name in names.items()
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {(symbol | names)[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)
