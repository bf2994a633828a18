"""What the command line must know of a checkpoint before vLLM loads it."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ouro_runtime
from ouro_runtime.checkpoint_config import MOST_LOOPS, ConfigError, OuroConfig, check_config
from ouro_runtime.config import LoopConfig
from ouro_runtime.model.checkpoint import CheckpointError, Sizes, check_checkpoint, read_json
from ouro_server.beside import TOKENIZER, check_beside

SHIPPED_NAME = "ouro-mini"
THINK_TOKENS = {"<think>": 3, "</think>": 4}
FULL_REQUESTS = 8
"""Requests of full length the default K/V pool has room for."""

ANY_LOOPS = 10**6
"""Stands for T while the checkpoint is not known."""

_GIB = 2**30


class RefusedError(Exception):
    """A checkpoint that cannot be served; the message says why."""


def shipped() -> Path:
    """The folder of the checkpoint that comes with the package."""
    return Path(ouro_runtime.__file__).parent / "checkpoints" / SHIPPED_NAME


def is_shipped(model: str) -> bool:
    """Whether a user means the shipped checkpoint by its name; a folder of that name is theirs."""
    return model == SHIPPED_NAME and not Path(model).is_dir()


def locate(model: str) -> str:
    """Where a model is: the shipped checkpoint's folder for its name, else what was said."""
    return str(shipped()) if is_shipped(model) else model


def read_config(model: str) -> dict[str, Any] | None:
    """A local checkpoint's `config.json`; None for one that is not a local folder.

    Raises:
        RefusedError: when the folder has no readable `config.json`, or a field in it is wrong.
    """
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith("."):
            raise RefusedError(f"{model}: no such folder")
        return None
    config = _read_object(folder, "config.json")
    if config is None:
        raise RefusedError(f"{model}: no config.json in this folder")
    if config.get("model_type") != "ouro":
        kind = config.get("model_type")
        raise RefusedError(f"{model}: model_type is {kind!r}; ouro-serve serves 'ouro' models")
    try:
        check_config(config)
        Sizes.of(config)
    except (ConfigError, CheckpointError) as error:
        raise RefusedError(f"{model}: {error}") from None
    return config


def check_overrides(overrides: Any) -> None:
    """Check what `--hf-overrides` puts in the place of fields of `config.json`.

    Raises:
        RefusedError: naming the option and the field.
    """
    if callable(overrides):
        return
    if not isinstance(overrides, Mapping):
        raise RefusedError(f"--hf-overrides must be a JSON object, got {overrides!r}")
    try:
        check_config(overrides, "--hf-overrides")
    except ConfigError as error:
        raise RefusedError(str(error)) from None


def _read_object(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of a checkpoint; None if there is no such file.

    Raises:
        RefusedError: if it cannot be read, or is something else.
    """
    try:
        return read_json(folder / name) if (folder / name).exists() else None
    except CheckpointError as error:
        raise RefusedError(f"{folder}: {error}") from None
    except OSError as error:  # a folder that may not be looked into
        raise RefusedError(f"{folder}: {name} cannot be read ({error.strerror})") from None


def check_depth_defaults(config: dict[str, Any] | None, depth: dict[str, Any]) -> None:
    """Check the server's depth defaults against a checkpoint, or on their own if it is not local.

    Raises:
        DepthError: naming the option.
    """
    known = {"total_ut_steps": MOST_LOOPS} if config is None else config
    LoopConfig.parse(SimpleNamespace(**known), depth)


def check_files(model: str, weights: bool = True, unread: Collection[str] = ()) -> None:
    """Compare a local checkpoint's tensors with its config, from headers only, and look into the
    files beside them.

    Args:
        weights: whether there are tensors to compare.
        unread: as `check_beside`.

    Raises:
        RefusedError: naming what is wrong.
    """
    try:
        if weights:
            check_checkpoint(model)
    except CheckpointError as error:
        raise RefusedError(str(error)) from None
    try:
        check_beside(Path(model), _read_object(Path(model), "config.json") or {}, unread)
    except CheckpointError as error:
        raise RefusedError(f"{model}: {error}") from None


def check_memory(model: str, pool: int, available: int) -> None:
    """Refuse a local checkpoint whose weights and K/V pool do not fit into memory.

    Args:
        pool, available: bytes.

    Raises:
        RefusedError: saying how much there is of each.
    """
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    if weights + pool > available:
        raise RefusedError(
            f"{model} does not fit into memory: weights {weights / _GIB:.1f} GiB, K/V "
            f"{pool / _GIB:.1f} GiB (--kv-cache-memory-bytes sets another size), "
            f"free {available / _GIB:.1f} GiB"
        )


def separates_reasoning(model: str) -> bool:
    """Whether the tokenizer marks reasoning with the released checkpoints' token ids.

    True for a checkpoint that is not local: the released ones do.
    """
    folder = Path(model)
    if not folder.is_dir():
        return True
    try:
        added = json.loads((folder / TOKENIZER).read_text()).get("added_tokens", [])
    except (OSError, ValueError):
        return False
    ids = {token["content"]: token["id"] for token in added}
    return all(ids.get(name) == number for name, number in THINK_TOKENS.items())


def stored_dtype(config: dict[str, Any]) -> str | None:
    """The number format of a checkpoint, from its `config.json`."""
    return config.get("torch_dtype") or config.get("dtype")


def full_request_bytes(config: dict[str, Any], length: int | None = None) -> int:
    """K/V of one request of `length` tokens, by default as long as the checkpoint allows."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    layers = config["total_ut_steps"] * config["num_hidden_layers"]
    bytes_each = 4 if stored_dtype(config) == "float32" else 2
    per_token = 2 * layers * kv_heads * head_dim * bytes_each
    longest = config.get("max_position_embeddings", OuroConfig().max_position_embeddings)
    return per_token * (length or longest)


def kv_pool_bytes(config: dict[str, Any], available: int, length: int | None = None) -> int:
    """Default size of the K/V pool on CPU: room for `FULL_REQUESTS` requests of full length, at
    least 256 MiB, at most a quarter of the memory `available` (bytes not in use)."""
    wanted = FULL_REQUESTS * full_request_bytes(config, length)
    return int(min(max(wanted, _GIB // 4), available / 4))
