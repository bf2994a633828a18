import pytest
import torch

from ouro_kernels import choose_splits, loop_decode_attention
from tests.kernels.support import as_fp8, check_against_reference, paged_caches, strided_rows

T, BLOCK_SIZE = 3, 8


def _inputs(lengths, q_heads, kv_heads, head_dim, dtype, device, layout="HND", fp8=False):
    """Rows of `lengths` at random loops. Everything a row must not read is NaN.

    The first block of the first row is page 0, at loop 0.
    """
    rows = len(lengths)
    per_row = [-(-length // BLOCK_SIZE) for length in lengths]
    total = sum(per_row) + 2
    order = [*(torch.randperm(total - 1) + 1).tolist(), 0]
    table = torch.full((T, rows, max(per_row, default=0) + 1), order[0], dtype=torch.int32)
    loop = torch.randint(0, T, (rows,), dtype=torch.int32)
    loop[:1] = 0
    cache_dtype = torch.float8_e4m3fn if fp8 else dtype
    k, v = paged_caches(total, BLOCK_SIZE, kv_heads, head_dim, cache_dtype, device, layout)
    for row, length in enumerate(lengths):
        for index in range(per_row[row]):
            page = order.pop()
            table[loop[row], row, index] = page
            count = min(BLOCK_SIZE, length - index * BLOCK_SIZE)
            for cache in (k, v):
                new = torch.randn(count, kv_heads, head_dim, device=device)
                new = as_fp8(new * 3) if fp8 else new.to(dtype)
                same = torch.uint8 if fp8 else dtype
                cache.view(same)[page, :count] = new.view(same)
    q = torch.randn(rows, q_heads, head_dim, device=device).to(dtype)
    q[[row for row, length in enumerate(lengths) if length == 0]] = float("nan")
    kwargs = {
        "q": q,
        "k_cache": k,
        "v_cache": v,
        "block_table": table.to(device),
        "loop": loop.to(device),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32, device=device),
        "scale": head_dim**-0.5,
    }
    if fp8:
        kwargs["k_scale"] = torch.tensor([0.25], device=device)
        kwargs["v_scale"] = torch.tensor([2.0], device=device)
    return kwargs


RAGGED = [1, 111, 0, 8, 37]
HEADS = [(2, 2), (6, 2), (3, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("q_heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("num_splits", [1, 4])
def test_matches_the_reference(q_heads, kv_heads, dtype, num_splits, device):
    kwargs = _inputs(RAGGED, q_heads, kv_heads, 32, dtype, device)
    result = check_against_reference(
        "loop_decode_attention", "loop_decode_attention", **kwargs, num_splits=num_splits
    )
    assert not result.isnan().any()
    assert (result[2] == 0).all()


@pytest.mark.parametrize("layout", ["HND", "NHD", "split", "unlike"])
@pytest.mark.parametrize(("q_heads", "kv_heads"), HEADS[:2])
@pytest.mark.parametrize("fp8", [False, True])
def test_layouts_strides_and_odd_heads(layout, q_heads, kv_heads, fp8, device):
    kwargs = _inputs([19, 0, 70], q_heads, kv_heads, 24, torch.bfloat16, device, layout, fp8)
    kwargs["block_table"] = strided_rows(kwargs["block_table"].roll(1, dims=1))
    kwargs["row_to_request"] = torch.tensor([1, 2, 0], dtype=torch.int32, device=device)
    kwargs["q"] = strided_rows(kwargs["q"])
    kwargs["out"] = strided_rows(torch.randn(3, q_heads, 24, device=device).bfloat16(), gap=32)
    check_against_reference(
        "loop_decode_attention", "loop_decode_attention", **kwargs, num_splits=2
    )


@pytest.mark.parametrize("lengths", [[], [0], [123], [0, 0]])
@pytest.mark.parametrize(("q_heads", "kv_heads"), HEADS[:2])
@pytest.mark.parametrize("num_splits", [None, 2])
def test_small_batches(lengths, q_heads, kv_heads, num_splits, device):
    kwargs = _inputs(lengths, q_heads, kv_heads, 16, torch.float32, device)
    check_against_reference(
        "loop_decode_attention", "loop_decode_attention", **kwargs, num_splits=num_splits
    )


def test_rows_of_one_request_read_their_own_loops(device):
    """Cells of one position at loops 0, 1, 2, through the row map: three different answers."""
    kwargs = _inputs([13], 2, 2, 16, torch.float32, device)
    for name in ("k_cache", "v_cache"):
        kwargs[name].copy_(torch.randn_like(kwargs[name]))
    kwargs["q"] = kwargs["q"].expand(3, -1, -1)
    kwargs["loop"] = torch.arange(3, dtype=torch.int32, device=device)
    kwargs["seq_lens"] = kwargs["seq_lens"].repeat(3)
    kwargs["row_to_request"] = torch.zeros(3, dtype=torch.int32, device=device)
    pages = [[[0, 1]], [[2, 3]], [[1, 0]]]
    kwargs["block_table"] = torch.tensor(pages, dtype=torch.int32, device=device)
    out = check_against_reference("loop_decode_attention", "loop_decode_attention", **kwargs)
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[1], out[2])


def test_a_row_does_not_depend_on_its_batch(device):
    kwargs = _inputs(RAGGED, 2, 2, 32, torch.float32, device)
    together = loop_decode_attention(**kwargs, num_splits=2)
    for row in range(len(RAGGED)):
        one = {name: kwargs[name][row : row + 1] for name in ("q", "loop", "seq_lens")}
        one["block_table"] = kwargs["block_table"][:, row : row + 1]
        alone = loop_decode_attention(**(kwargs | one), num_splits=2)
        assert torch.equal(alone[0], together[row]), row


@pytest.mark.parametrize(("q_heads", "kv_heads"), HEADS[:2])
def test_scores_are_not_rounded_to_half(q_heads, kv_heads, device):
    """Scores of some tens: in half precision they would be wrong by more than weights bear."""
    kwargs = _inputs([70, 9], q_heads, kv_heads, 32, torch.float16, device)
    kwargs["q"] *= 16
    check_against_reference("loop_decode_attention", "loop_decode_attention", **kwargs)


def test_extreme_scores_stay_finite(device):
    kwargs = _inputs([70, 9], 2, 2, 16, torch.float32, device)
    kwargs["q"] *= 1e4
    for splits in (1, 2):
        assert loop_decode_attention(**kwargs, num_splits=splits).isfinite().all()


@pytest.mark.parametrize("rows", [0, 1, 8, 32, 128, 1000])
@pytest.mark.parametrize("length", [1, 128, 1024, 65536])
def test_splits_come_from_shapes_and_are_powers_of_two(rows, length):
    splits = choose_splits(rows, 16, length)
    assert 1 <= splits <= 32
    assert splits & (splits - 1) == 0
    assert splits == 1 or splits * 128 <= length


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda k: {"q": k["q"][:, :3]}),
        ("k_cache", lambda k: {"k_cache": k["k_cache"][..., :8]}),
        ("v_cache", lambda k: {"v_cache": k["v_cache"][1:]}),
        ("block_table", lambda k: {"block_table": k["block_table"].long()}),
        ("block_table", lambda k: {"block_table": k["block_table"][:, :1]}),
        ("loop", lambda k: {"loop": k["loop"][:1]}),
        ("seq_lens", lambda k: {"seq_lens": k["seq_lens"].float()}),
        ("row_to_request", lambda k: {"row_to_request": k["loop"][:1]}),
        ("k_scale", lambda k: {"k_scale": torch.ones(1)}),
        ("num_splits", lambda k: {"num_splits": 3}),
        ("block_table", lambda k: {"block_table": k["block_table"][0]}),
    ],
)
def test_a_bad_argument_is_named(name, change):
    kwargs = _inputs([4, 5], 4, 2, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"^{name}: "):
        loop_decode_attention(**(kwargs | change(kwargs)))
