"""Random checkpoints in the released format, of any size: for benchmarks, tests and memory checks.

    python -m benchmarks.random_checkpoint ouro-1.4b FOLDER

Needs numpy only, and holds one slice of one tensor in memory. The same seed gives the same bytes;
a tensor's values follow from the seed and its name, not from its place or the number of shards.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

PRESETS: dict[str, dict[str, Any]] = {
    "ouro-1.4b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 49152,
        "max_position_embeddings": 65536,
    },
    "mid": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 10,
        "num_attention_heads": 16,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 512,
    },
}
PRESETS["mid-settled"] = PRESETS["mid"] | {"residual": 0.002}
"""By name, each with four loops, in bfloat16 unless told otherwise. `mid-settled`: what is read out
after two loops is, nearly always, what is read out after four."""

DTYPES = {"bfloat16": ("BF16", 2), "float32": ("F32", 4)}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
SLICE = 1 << 22
"""Numbers made at a time."""

Shape = tuple[int, ...]


def write_checkpoint(
    folder: str | Path,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    vocab_size: int,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    total_ut_steps: int = 4,
    max_position_embeddings: int = 512,
    tie_word_embeddings: bool = False,
    dtype: str = "bfloat16",
    seed: int = 0,
    shard_bytes: int = 1 << 30,
    tokenizer: str | Path | None = None,
    residual: float = 1.0,
    **config: Any,
) -> Path:
    """Write `config.json` and the weights; returns the folder.

    Weights are scaled so that greedy decoding wanders and the gate's depths spread over 1..T.

    Args:
        head_dim, num_key_value_heads: default to hidden_size / heads and to the heads.
        dtype: `bfloat16` or `float32`.
        shard_bytes: a checkpoint larger than this is split, with an index.
        tokenizer: a folder whose tokenizer files are copied.
        residual: scale of what a layer adds to the state; the smaller, the less a loop moves it.
        config: further keys of `config.json`, which win over those written here.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kv_heads = num_key_value_heads or num_attention_heads
    head_dim = head_dim or hidden_size // num_attention_heads
    written = {
        "architectures": ["OuroForCausalLM"],
        "model_type": "ouro",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "total_ut_steps": total_ut_steps,
        "early_exit_threshold": 1.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": tie_word_embeddings,
        "torch_dtype": dtype,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")

    query, key = num_attention_heads * head_dim, kv_heads * head_dim
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab_size, hidden_size)}
    for layer in range(num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (query, hidden_size),
            f"{prefix}.self_attn.k_proj.weight": (key, hidden_size),
            f"{prefix}.self_attn.v_proj.weight": (key, hidden_size),
            f"{prefix}.self_attn.o_proj.weight": (hidden_size, query),
            f"{prefix}.mlp.gate_proj.weight": (intermediate_size, hidden_size),
            f"{prefix}.mlp.up_proj.weight": (intermediate_size, hidden_size),
            f"{prefix}.mlp.down_proj.weight": (hidden_size, intermediate_size),
            f"{prefix}.input_layernorm.weight": (hidden_size,),
            f"{prefix}.input_layernorm_2.weight": (hidden_size,),
            f"{prefix}.post_attention_layernorm.weight": (hidden_size,),
            f"{prefix}.post_attention_layernorm_2.weight": (hidden_size,),
        }
    shapes |= {
        "model.norm.weight": (hidden_size,),
        "model.early_exit_gate.weight": (1, hidden_size),
        "model.early_exit_gate.bias": (1,),
    }
    if not tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab_size, hidden_size)
    write_shards(folder, shapes, dtype, seed, shard_bytes, residual)
    for name in TOKENIZER_FILES if tokenizer else ():
        source = Path(tokenizer or "") / name
        if source.exists():
            shutil.copy(source, folder)
    return folder


def write_shards(
    folder: Path,
    shapes: dict[str, Shape],
    dtype: str,
    seed: int,
    shard_bytes: int,
    residual: float,
) -> None:
    """Write the tensors in order, into as many files as it takes."""
    label, width = DTYPES[dtype]
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * width
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size

    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(names, file)
        with (folder / file).open("wb") as stream:
            write_header(stream, {name: shapes[name] for name in names}, label, width)
            for name in names:
                for values in random_values(name, shapes[name], seed):
                    stream.write(encode(settle(name, values, residual), dtype))
    if len(shards) > 1:
        total = sum(int(np.prod(shape)) for shape in shapes.values()) * width
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1) + "\n")


def write_header(stream: BinaryIO, shapes: dict[str, Shape], label: str, width: int) -> None:
    """safetensors: a length, then JSON that says where in what follows each tensor lies."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + int(np.prod(shape)) * width
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)


def random_values(name: str, shape: Shape, seed: int) -> Iterator[np.ndarray]:
    """A tensor's values in float32, slice by slice."""
    generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
    if name.endswith("early_exit_gate.bias"):
        yield np.full(1, -0.8, np.float32)
        return
    mean, scale = 0.0, 0.9 * shape[-1] ** -0.5
    if "norm" in name:
        mean, scale = 1.0, 0.1
    elif "embed_tokens" in name:
        scale = 0.1
    elif "early_exit_gate" in name:
        scale *= 1.5
    count = int(np.prod(shape))
    for start in range(0, count, SLICE):
        values = generator.standard_normal(min(SLICE, count - start), dtype=np.float32)
        yield values * np.float32(scale) + np.float32(mean)


def settle(name: str, values: np.ndarray, residual: float) -> np.ndarray:
    """`values` of a model whose layers add only `residual` of what they would, and whose final
    norm, which every loop ends with, leaves the state's direction as it is in the same measure."""
    if "layernorm_2" in name:
        return values * np.float32(residual)
    if name == "model.norm.weight":
        return 1 + (values - 1) * np.float32(residual)
    return values


def encode(values: np.ndarray, dtype: str) -> bytes:
    """float32 values as little-endian bytes of `dtype`; bfloat16 rounds to nearest even."""
    if dtype == "float32":
        return values.astype("<f4").tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint.")
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--loops", type=int, default=4, help="total_ut_steps (default: 4)")
    parser.add_argument("--tokenizer", type=Path, help="folder to copy tokenizer files from")
    options = parser.parse_args()
    write_checkpoint(
        options.folder,
        **PRESETS[options.preset],
        total_ut_steps=options.loops,
        dtype=options.dtype,
        seed=options.seed,
        tokenizer=options.tokenizer,
    )
    size = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
    print(f"{options.folder}: {options.preset}, {options.dtype}, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
