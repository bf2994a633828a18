"""Argument checks of the ops. Each failure is a ValueError that names the argument."""

from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int32, torch.int64)
FP8 = torch.float8_e4m3fn


def require(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {message}")


def check(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Rank, sizes (None: any), dtype, device, and stride 1 in the last dimension.

    Leading dimensions may have any stride; a vector must be contiguous.
    """
    require(tensor.dim() == len(shape), name, f"expected rank {len(shape)}, got {tensor.dim()}")
    sizes = zip(shape, tensor.shape, strict=True)
    matches = all(want is None or want == got for want, got in sizes)
    require(matches, name, f"expected shape {list(shape)}, got {list(tensor.shape)}")
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    require(tensor.dtype in allowed, name, f"expected dtype in {allowed}, got {tensor.dtype}")
    require(tensor.device == device, name, f"expected device {device}, got {tensor.device}")
    dense = tensor.numel() == 0 or tensor.shape[-1] == 1 or tensor.stride(-1) == 1
    require(dense, name, f"last dimension must have stride 1, got strides {tensor.stride()}")


def check_optional(
    name: str,
    tensor: torch.Tensor | None,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype],
    device: torch.device,
) -> None:
    if tensor is not None:
        check(name, tensor, shape, dtypes, device)


def check_caches(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    head_dim: int,
    compute_dtype: torch.dtype,
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    device: torch.device,
) -> None:
    """One layer's K and V views [pages, block_size, kv_heads, head_dim], and their fp8 scales."""
    check("k_cache", k_cache, (None, None, None, head_dim), (compute_dtype, FP8), device)
    check("v_cache", v_cache, tuple(k_cache.shape), k_cache.dtype, device)
    for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
        if k_cache.dtype == FP8:
            if scale is None:
                raise ValueError(f"{name}: an fp8 cache needs it")
            check(name, scale.reshape(-1), (1,), torch.float32, device)
        else:
            require(scale is None, name, f"given, but the cache is {k_cache.dtype}")
