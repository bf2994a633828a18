import pytest
import torch

from ouro_kernels import rope_kv_write
from ouro_kernels.rope_kv_write import reference
from tests.kernels.support import (
    check_against_reference,
    paged_caches,
    pages_by_loop,
    strided_rows,
)

T, BLOCKS, BLOCK_SIZE = 3, 5, 4
MAX_POSITION = BLOCKS * BLOCK_SIZE


def _inputs(rows, q_heads, kv_heads, head_dim, dtype, device, layout="HND", cache_dtype=None):
    """Rows of one request at distinct positions and random loops; every third row is padding.

    Row 0 has the first position, in the first slot of all, row 1 the last position. What copies
    need comes beside the other arguments.
    """
    positions = torch.randperm(MAX_POSITION - 2, device=device)[:rows] + 1
    loop = torch.randint(0, T, (rows,), device=device)
    for row, (position, t) in enumerate(((0, 0), (MAX_POSITION - 1, T - 1))[:rows]):
        positions[row], loop[row] = position, t
    table = pages_by_loop(T, BLOCKS, device)
    pages = table[loop, 0, positions // BLOCK_SIZE].long()
    slots = pages * BLOCK_SIZE + positions % BLOCK_SIZE
    slots[torch.arange(rows, device=device) % 3 == 2] = -1
    angles = torch.rand(MAX_POSITION, head_dim // 2, device=device) * 6
    caches = paged_caches(
        BLOCKS * T, BLOCK_SIZE, kv_heads, head_dim, cache_dtype or dtype, device, layout
    )
    return {
        "qkv": torch.randn(rows, (q_heads + 2 * kv_heads) * head_dim, device=device).to(dtype),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype),
        "positions": positions,
        "slot_mapping": slots,
        "k_cache": caches[0],
        "v_cache": caches[1],
    }, {
        "fill_copies": (T - 1 - loop).int(),
        "block_table": table,
        "loop": loop.int(),
        "row_to_request": torch.zeros(rows, dtype=torch.int32, device=device),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "q_heads", "kv_heads", "head_dim"),
    [(0, 2, 2, 16), (1, 4, 4, 16), (11, 5, 5, 24), (9, 6, 2, 32), (7, 3, 1, 14)],
)
def test_matches_the_reference(rows, q_heads, kv_heads, head_dim, dtype, device):
    kwargs, _ = _inputs(rows, q_heads, kv_heads, head_dim, dtype, device)
    check_against_reference("rope_kv_write", "rope_kv_write", **kwargs)


@pytest.mark.parametrize("layout", ["HND", "NHD", "split", "unlike"])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_layouts_copies_and_fp8(layout, cache_dtype, device):
    kwargs, copies = _inputs(13, 4, 2, 24, torch.bfloat16, device, layout, cache_dtype)
    kwargs["qkv"] = strided_rows(kwargs["qkv"])
    kwargs["cos_sin"] = strided_rows(kwargs["cos_sin"]).float()
    kwargs["positions"] = kwargs["positions"].int()
    kwargs |= copies
    kwargs["q_out"] = strided_rows(torch.randn(13, 4, 24, device=device).bfloat16())
    if cache_dtype == torch.float8_e4m3fn:
        kwargs["qkv"][0] *= 1000  # beyond fp8's range: must saturate, not become NaN
        kwargs["k_scale"] = torch.tensor([0.5], device=device)
        kwargs["v_scale"] = torch.tensor(2.0, device=device)
    check_against_reference("rope_kv_write", "rope_kv_write", **kwargs)


def test_the_first_slot_of_the_first_page_is_written_and_padding_is_not(device):
    kwargs, _ = _inputs(2, 1, 1, 16, torch.float32, device)
    kwargs["positions"][:] = 0
    kwargs["slot_mapping"][:] = torch.tensor([0, -1])
    rope_kv_write(**kwargs)
    for name in ("k_cache", "v_cache"):
        written = ~kwargs[name].isnan().all(-1)[..., 0]
        assert written.nonzero().tolist() == [[0, 0]], name


def test_copies_reach_exactly_the_deeper_loops(device):
    kwargs, copies = _inputs(1, 1, 1, 16, torch.float32, device)
    block, offset, loop = 2, 3, 1
    pages = copies["block_table"][:, 0, block].tolist()
    kwargs["positions"][:] = block * BLOCK_SIZE + offset
    kwargs["slot_mapping"][0] = pages[loop] * BLOCK_SIZE + offset
    copies["loop"][:], copies["fill_copies"][:] = loop, T - 1 - loop
    rope_kv_write(**kwargs, **copies)
    for name in ("k_cache", "v_cache"):
        written = ~kwargs[name].isnan().all(-1)[..., 0]
        assert written.nonzero().tolist() == [[page, offset] for page in sorted(pages[loop:])], name
    assert torch.equal(kwargs["v_cache"][pages[-1], offset, 0], kwargs["qkv"][0, 32:])


def test_rows_that_are_requests_and_loops_of_one_page(device):
    """Each row finds its pages in its own line of the tables; the second has one for all loops."""
    kwargs, copies = _inputs(2, 2, 2, 16, torch.float32, device)
    del copies["row_to_request"]
    table = copies["block_table"].repeat(1, 2, 1)
    table[:, 1] = table[-1, 1].clone()
    copies["block_table"], copies["fill_copies"][:] = strided_rows(table), T - 1
    copies["loop"][:] = 0
    kwargs["slot_mapping"][1] = int(table[0, 1, -1]) * BLOCK_SIZE + BLOCK_SIZE - 1
    check_against_reference("rope_kv_write", "rope_kv_write", **kwargs, **copies)
    written = ~kwargs["k_cache"].isnan().all(-1)[..., 0]
    assert written.sum() == T + 1


def test_an_fp8_cache_holds_keys_that_were_rounded_before(device):
    """To the model's dtype, as where a norm of vLLM's and its cache write are two kernels.

    Not to the bit: a fused multiply-add may round one in thousands otherwise. Without the first
    rounding one in fifty differs.
    """
    kwargs, _ = _inputs(18, 4, 4, 64, torch.bfloat16, device, "split", torch.float8_e4m3fn)
    scales = {name: torch.tensor([0.5], device=device) for name in ("k_scale", "v_scale")}
    twin = {name: value.clone() for name, value in kwargs.items()}
    rope_kv_write(**kwargs, **scales)
    reference.rope_kv_write(**twin, **scales)
    for half in (slice(32), slice(32, None)):
        stored, expected = (each["k_cache"].view(torch.uint8)[..., half] for each in (kwargs, twin))
        written = expected != 0x7F
        assert (stored != expected).sum() <= 0.002 * written.sum()


@pytest.mark.parametrize("slot", [-1, -BLOCK_SIZE - 1])
def test_padding_writes_nothing(slot, device):
    kwargs, copies = _inputs(2, 2, 2, 16, torch.float32, device)
    kwargs["slot_mapping"][:] = slot
    kwargs["q_out"] = torch.full((2, 2, 16), 7.0, device=device)
    check_against_reference("rope_kv_write", "rope_kv_write", **kwargs, **copies)
    assert (kwargs["q_out"] == 7).all()
    assert kwargs["k_cache"].isnan().all() and kwargs["v_cache"].isnan().all()


def test_the_position_of_padding_is_not_read(device):
    kwargs, _ = _inputs(3, 2, 2, 16, torch.float32, device)
    kwargs["positions"][2] = 2**40  # far outside the table
    check_against_reference("rope_kv_write", "rope_kv_write", **kwargs)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qkv", lambda k: {"qkv": k["qkv"][:, :-8]}),
        ("cos_sin", lambda k: {"cos_sin": k["cos_sin"][:, :15]}),
        ("positions", lambda k: {"positions": k["positions"][1:]}),
        ("slot_mapping", lambda k: {"slot_mapping": k["slot_mapping"].int()}),
        ("k_cache", lambda k: {"k_cache": k["k_cache"][0]}),
        ("v_cache", lambda k: {"v_cache": k["v_cache"].half()}),
        ("k_scale", lambda k: {"k_scale": torch.ones(1)}),
        ("fill_copies", lambda k: {"fill_copies": torch.zeros(3)}),
        ("fill_copies", lambda k: {"fill_copies": torch.zeros(3, dtype=torch.int32)}),
        ("q_out", lambda k: {"q_out": torch.zeros(3, 4, 16, dtype=torch.half)}),
    ],
)
def test_a_bad_argument_is_named(name, change):
    kwargs, _ = _inputs(3, 2, 1, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"^{name}: "):
        rope_kv_write(**(kwargs | change(kwargs)))
