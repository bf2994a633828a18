"""Is this folder an Ouro checkpoint? Answered before any weight is read.

Reads `config.json`, the index of a sharded checkpoint and the headers of its safetensors files,
which name every tensor with its type, shape and place. Imports neither torch nor vLLM, so that a
wrong folder is refused in milliseconds and not after an engine has started.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32", "F64")
SHOWN = 3
"""Tensors a message names of each kind of fault; a count stands for the others."""

MAX_HEADER = 100_000_000
"""Bytes; safetensors' own limit. A larger number means that the file is something else."""

NARROW = 63
"""The largest 8-bit weight of which two products with an 8-bit input fit into 16 bits."""

Shape = tuple[int, ...]


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message says what is wrong with which folder."""


def check_checkpoint(path: str | Path) -> None:
    """Return if the folder `path` holds a complete Ouro checkpoint.

    Tensors of a quantized checkpoint (`quantization_config`) are checked by name only where the
    quantization replaces them.

    Raises:
        CheckpointError: with one message, for a missing or unreadable file, another `model_type`,
            a size that makes no sense, and missing, extra or wrongly shaped tensors.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder}: no such folder")
    try:
        config = read_json(folder / "config.json")
        sizes = Sizes.of(config)
        tensors = read_headers(weight_files(folder))
        compare(sizes, tensors, quantized=bool(config.get("quantization_config")))
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from None


@dataclass(frozen=True)
class Sizes:
    """The numbers of `config.json` that the tensors follow from."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Read and checked; CheckpointError names the first key that is wrong."""
        kind = config.get("model_type")
        if kind != "ouro":
            raise CheckpointError(f"config.json says model_type {kind!r}; only 'ouro' is served")
        named = config.get("architectures")
        if named != ["OuroForCausalLM"]:
            raise CheckpointError(
                f"config.json says architectures {named!r}; only ['OuroForCausalLM'] is served"
            )
        positive(config, "total_ut_steps")
        hidden = positive(config, "hidden_size")
        heads = positive(config, "num_attention_heads")
        kv_heads = heads
        if config.get("num_key_value_heads", 0) is not None:
            kv_heads = positive(config, "num_key_value_heads")
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json says num_attention_heads {heads}, which is no multiple of "
                f"num_key_value_heads {kv_heads}"
            )
        if config.get("head_dim") is not None:
            head_dim = positive(config, "head_dim")
        elif hidden % heads:
            raise CheckpointError(
                f"config.json has no head_dim, and hidden_size {hidden} is no multiple of "
                f"num_attention_heads {heads}"
            )
        else:
            head_dim = hidden // heads
        return cls(
            vocab=positive(config, "vocab_size"),
            hidden=hidden,
            intermediate=positive(config, "intermediate_size"),
            layers=positive(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            tied=config.get("tie_word_embeddings") is True,
        )

    def linears(self) -> dict[str, Shape]:
        """The weights a quantization may replace, by the name of their layer."""
        hidden, inner = self.hidden, self.intermediate
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        return {
            f"model.layers.{i}.{name}": shape
            for i in range(self.layers)
            for name, shape in shapes.items()
        }

    def tensors(self) -> dict[str, Shape]:
        """Every tensor of the released format."""
        norms = (
            "input_layernorm",
            "input_layernorm_2",
            "post_attention_layernorm",
            "post_attention_layernorm_2",
        )
        return {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            **{f"{name}.weight": shape for name, shape in self.linears().items()},
            **{
                f"model.layers.{i}.{name}.weight": (self.hidden,)
                for i in range(self.layers)
                for name in norms
            },
            "model.norm.weight": (self.hidden,),
            "model.early_exit_gate.weight": (1, self.hidden),
            "model.early_exit_gate.bias": (1,),
            "lm_head.weight": (self.vocab, self.hidden),
        }


@dataclass(frozen=True)
class Tensor:
    """What a header says about one tensor."""

    dtype: str
    shape: Shape


def compare(sizes: Sizes, tensors: Mapping[str, Tensor], quantized: bool) -> None:
    """Raise CheckpointError unless `tensors` are those of a model of these `sizes`."""
    expected = sizes.tensors()
    optional = {"lm_head.weight"} if sizes.tied else set()
    found = dict(tensors)
    if quantized:
        layers = {*sizes.linears(), "lm_head"}
        replaced = {name for name in found if name.rpartition(".")[0] in layers}
        for name in replaced:
            del found[name]
            expected.pop(f"{name.rpartition('.')[0]}.weight", None)

    missing = [name for name in expected if name not in found and name not in optional]
    extra = sorted(found.keys() - expected.keys())
    both = [name for name in expected if name in found]
    shapes = [
        f"{name} is {list(found[name].shape)} and should be {list(expected[name])}"
        for name in both
        if found[name].shape != expected[name]
    ]
    types = [f"{name} is {found[name].dtype}" for name in both if found[name].dtype not in FLOATS]
    faults = [
        listed("missing", missing),
        listed("not part of the model", extra),
        listed("of another shape than config.json says", shapes),
        listed("not of a floating-point type", types),
    ]
    if any(faults):
        raise CheckpointError(
            "its tensors do not fit its config.json "
            f"(num_hidden_layers {sizes.layers}, hidden_size {sizes.hidden}). "
            + "; ".join(fault for fault in faults if fault)
        )


def listed(what: str, items: list[str]) -> str:
    """`items` in short, or nothing if there are none."""
    if not items:
        return ""
    rest = f", and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{what}: {', '.join(items[:SHOWN])}{rest}"


def positive(config: Mapping[str, Any], key: str) -> int:
    """`config[key]`, an integer of 1 or more."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        said = repr(value) if key in config else "nothing"
        raise CheckpointError(f"config.json must say {key} as an integer of 1 or more; says {said}")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all of them there and each named once."""
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                "has no *.safetensors file (weights in other formats do not load)"
            )
        return files
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(listed(f"{INDEX} names files that are not there", absent))
    listed_tensors = {str(tensor) for tensor in weight_map}
    held = read_headers(folder / name for name in names).keys()
    if listed_tensors - held:
        lost = sorted(listed_tensors - held)
        raise CheckpointError(listed(f"{INDEX} names tensors that its files do not hold", lost))
    return [folder / name for name in names]


def read_headers(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of `files`; CheckpointError where a file is broken or two hold the same one."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{name} is in {file.name} and in another file too")
            tensors[name] = tensor
    return tensors


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by its header.

    Raises:
        CheckpointError: if the file is no safetensors file or shorter than its header says.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {k: Tensor(str(v["dtype"]), tuple(v["shape"])) for k, v in header.items()}
        end = max((int(v["data_offsets"][1]) for v in header.values()), default=0)
    except (ValueError, struct.error, AttributeError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{file.name} is not a safetensors file (a download that broke off, or the pointer "
            "that Git LFS leaves in a file's place?)"
        ) from error
    if size < 8 + length + end:
        raise CheckpointError(f"{file.name} breaks off: {size} bytes of {8 + length + end}")
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or CheckpointError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"has no {file.name}") from None
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.name} is not a JSON object")
    return content
