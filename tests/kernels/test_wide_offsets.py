"""Rows, pages and heads more than 2**31 elements from the first: offsets need 64 bits."""

import pytest
import torch

from ouro_kernels import CacheTable
from tests.kernels.support import Vast, check_against_reference

N = 3


@pytest.fixture
def vast(device):
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 2 * Vast.BYTES:
        pytest.skip(f"needs {2 * Vast.BYTES >> 30} GiB of free GPU memory")
    return Vast(device)


def _randn(*size, device):
    return torch.randn(*size, device=device).half()


def _ints(values, device, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


@pytest.mark.parametrize("function", ["rms_norm", "sandwich_norm", "loop_norm"])
def test_sandwich_norm(function, vast, device):
    weights = {
        "rms_norm": ("weight",),
        "sandwich_norm": ("post_weight", "pre_weight"),
        "loop_norm": ("post_weight", "final_weight", "pre_weight"),
    }[function]
    kwargs = {name: _randn(16, device=device) for name in weights}
    for name in ("x", "out", "residual")[: 1 + len(weights)]:
        kwargs[name] = vast.place(_randn(N, 16, device=device), 0)
    check_against_reference("sandwich_norm", function, eps=1e-6, **kwargs)


def test_exit_gate(vast, device):
    check_against_reference(
        "exit_gate",
        "exit_gate",
        h=vast.place(_randn(N, 16, device=device), 0),
        weight=_randn(16, device=device),
        bias=_randn(1, device=device),
        survival=torch.ones(N, device=device),
        depth=_ints([0] * N, device),
        loop=_ints([0, 1, 2], device),
        threshold=torch.full((N,), 0.5, device=device),
        min_loops=_ints([1] * N, device),
        max_loops=_ints([4] * N, device),
        total_loops=4,
        history=vast.place(torch.zeros(N, 4, device=device), 0),
    )


def _tables(vast, dim, pages, device):
    """[3, 3, 1], by loop and request, the pages of `pages` [3] by loop."""
    table = _ints([[[page]] * N for page in pages], device)
    return vast.place(table, dim)


def _caches(vast, dim, device):
    """Pages of three positions of three heads."""
    return {
        name: vast.place(_randn(N, N, N, 16, device=device), dim) for name in ("k_cache", "v_cache")
    }


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_read_out(name, vast, device):
    kwargs = {key: _randn(N, 16, device=device) for key in ("hidden", "weight")}
    kwargs[name] = vast.place(kwargs[name], 0)
    mask = torch.tensor([True, False, True], device=device)
    check_against_reference("read_out", "read_out", read_mask=mask, **kwargs)


@pytest.mark.parametrize("dim", range(3), ids=["pages", "offsets", "heads"])
def test_rope_kv_write(dim, vast, device):
    check_against_reference(
        "rope_kv_write",
        "rope_kv_write",
        qkv=vast.place(_randn(N, 9 * 16, device=device), 0),
        cos_sin=vast.place(_randn(N, 16, device=device), 0),
        positions=_ints([0, 2, 1], device),
        slot_mapping=_ints([0, 2, 7], device, torch.int64),
        **_caches(vast, dim, device),
        q_out=vast.place(_randn(N, 3, 16, device=device), 0),
        fill_copies=_ints([1, 0, 1], device),
        block_table=_tables(vast, dim % 2, [0, 1, 1], device),
        loop=_ints([0, 0, 1], device),
    )


@pytest.mark.parametrize("dim", range(3), ids=["pages", "offsets", "heads"])
@pytest.mark.parametrize("q_heads", [3, 6])
def test_loop_decode_attention(q_heads, dim, vast, device):
    """One block of three positions at loops 0, 1 and 2, so pages 0, 1 and 2."""
    check_against_reference(
        "loop_decode_attention",
        "loop_decode_attention",
        q=vast.place(_randn(N, q_heads, 16, device=device), 0),
        **_caches(vast, dim, device),
        block_table=_tables(vast, dim % 2, [0, 1, 2], device),
        row_to_request=_ints([0, 1, 2], device),
        loop=_ints([0, 1, 2], device),
        seq_lens=_ints([3] * N, device),
        scale=0.25,
        out=vast.place(_randn(N, q_heads, 16, device=device), 0),
    )


@pytest.mark.parametrize("dim", range(3), ids=["pages", "offsets", "heads"])
def test_standin_fill(dim, vast, device):
    caches = [_caches(vast, dim, device) for _ in range(2)]
    check_against_reference(
        "standin_fill",
        "standin_fill",
        table=CacheTable(*([pair[name] for pair in caches] for name in ("k_cache", "v_cache"))),
        block_table=_tables(vast, dim % 2, [0, 1, 2], device),
        slot_mapping=_ints([0, 1, 5], device, torch.int64),
        positions=_ints([0, 1, 2], device, torch.int64),
        loop=_ints([0, 0, 1], device),
        copies=_ints([2, 0, 1], device),
    )


@pytest.mark.parametrize("dim", range(2), ids=["loops", "requests"])
def test_next_pass(dim, vast, device):
    check_against_reference(
        "next_pass",
        "next_pass",
        hidden=vast.place(_randn(N, 16, device=device), 0),
        tokens=_ints([0, 1, 2], device),
        embedding=vast.place(_randn(N, 16, device=device), 0),
        # The last row goes to loop 2, or to another position.
        exit_mask=torch.tensor([True, True, dim == 1], device=device),
        active=torch.ones(N, dtype=torch.bool, device=device),
        loop=_ints([0, 0, 1], device),
        positions=_ints([0] * N, device),
        survival=torch.ones(N, device=device),
        depth=_ints([1] * N, device),
        block_table=_tables(vast, dim, [5, 6, 7], device),
        slot_mapping=_ints([0] * N, device, torch.int64),
        seq_lens=_ints([0] * N, device),
        block_size=4,
        row_to_request=_ints([0, 1, 2], device),
    )
