import pytest
import torch

from ouro_kernels import CacheTable, standin_fill
from tests.kernels.support import (
    check_against_reference,
    paged_caches,
    pages_by_loop,
    strided_rows,
)

T, BLOCKS, BLOCK_SIZE, LAYERS = 4, 8, 3, 2
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)


def _inputs(rows, heads, head_dim, dtype, device, layout="HND"):
    """Rows of one request at distinct positions and random loops."""
    layers = [
        paged_caches(BLOCKS * T, BLOCK_SIZE, heads, head_dim, dtype, device, layout)
        for _ in range(LAYERS)
    ]
    for cache in (cache for pair in layers for cache in pair):
        cache.copy_(torch.randn(cache.shape, device=device).to(dtype))
    slots = torch.randperm(BLOCKS * BLOCK_SIZE - 2, device=device)[:rows] + 1
    loop = torch.randint(0, T, (rows,), device=device, dtype=torch.int32)
    # The first slot of all and the last that has a deeper one; a row whose loop is the last.
    for row, (slot, t) in enumerate(((0, 0), (BLOCKS * BLOCK_SIZE - 1, T - 2))[:rows]):
        slots[row], loop[row] = slot, t
    loop[2:3] = T - 1
    table = pages_by_loop(T, BLOCKS, device)
    pages = table[loop.long(), 0, slots // BLOCK_SIZE].long()
    return {
        "table": CacheTable([k for k, _ in layers], [v for _, v in layers]),
        "block_table": table,
        "slot_mapping": pages * BLOCK_SIZE + slots % BLOCK_SIZE,
        "positions": slots,
        "loop": loop,
        "row_to_request": torch.zeros(rows, dtype=torch.int32, device=device),
    }


def _copies(kind, kwargs):
    """All that a row's deeper loops need, where it leaves."""
    index = torch.arange(len(kwargs["loop"]), device=kwargs["loop"].device)
    leaves = {
        "none": index < 0,
        "all": index >= 0,
        "one": index == len(index) // 2,
        "ragged": (index * 7) % 5 < 2,
    }[kind]
    return (T - 1 - kwargs["loop"]) * leaves


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(0, 2, 16), (1, 5, 24), (17, 3, 11)])
@pytest.mark.parametrize("kind", ["none", "all", "one", "ragged"])
def test_matches_the_reference(rows, heads, head_dim, dtype, kind, device):
    kwargs = _inputs(rows, heads, head_dim, dtype, device)
    kwargs["copies"] = _copies(kind, kwargs)
    check_against_reference("standin_fill", "standin_fill", **kwargs)


@pytest.mark.parametrize("layout", ["HND", "NHD", "split", "unlike"])
def test_layouts_padding_and_rows_that_are_requests(layout, device):
    kwargs = _inputs(9, 2, 32, torch.bfloat16, device, layout)
    kwargs["copies"] = _copies("all", kwargs)
    kwargs["slot_mapping"][::2] = -1
    # Each row finds the same pages in its own line of the tables.
    del kwargs["row_to_request"]
    kwargs["block_table"] = strided_rows(kwargs["block_table"].expand(T, 9, BLOCKS))
    check_against_reference("standin_fill", "standin_fill", **kwargs)


def test_many_heads_take_several_programs(device):
    kwargs = _inputs(3, 20, 128, torch.float32, device)
    kwargs["copies"] = _copies("all", kwargs)
    check_against_reference("standin_fill", "standin_fill", **kwargs)


@pytest.mark.parametrize("copies", [1, 2])
def test_only_so_many_deeper_loops_of_the_same_token_change(copies, device):
    kwargs = _inputs(1, 1, 16, torch.float32, device)
    block, offset, loop = 3, 2, 1
    pages = kwargs["block_table"][:, 0, block].tolist()
    kwargs["positions"][0] = block * BLOCK_SIZE + offset
    kwargs["slot_mapping"][0] = pages[loop] * BLOCK_SIZE + offset
    kwargs["loop"][0] = loop
    kwargs["copies"] = torch.full_like(kwargs["loop"], copies)
    caches = (*kwargs["table"].k_caches, *kwargs["table"].v_caches)
    before = [cache.clone() for cache in caches]
    standin_fill(**kwargs)
    filled = pages[loop + 1 : loop + 1 + copies]
    for cache, old in zip(caches, before, strict=True):
        changed = (cache != old).any(-1).any(-1).nonzero().tolist()
        assert changed == [[page, offset] for page in sorted(filled)]
        for page in filled:
            assert torch.equal(cache[page, offset], old[pages[loop], offset])


def test_loops_of_one_page_are_as_they_were(device):
    kwargs = _inputs(5, 2, 16, torch.float32, device)
    kwargs["block_table"][:] = kwargs["block_table"][-1:].clone()
    pages = kwargs["block_table"][-1, 0, kwargs["positions"] // BLOCK_SIZE].long()
    kwargs["slot_mapping"] = pages * BLOCK_SIZE + kwargs["positions"] % BLOCK_SIZE
    kwargs["copies"] = _copies("all", kwargs)
    before = [cache.clone() for cache in kwargs["table"].k_caches]
    check_against_reference("standin_fill", "standin_fill", **kwargs)
    for cache, old in zip(kwargs["table"].k_caches, before, strict=True):
        assert torch.equal(cache, old)


def test_a_bad_argument_is_named(device):
    kwargs = _inputs(3, 2, 16, torch.float32, device)
    kwargs["copies"] = _copies("all", kwargs)
    for name, bad in (
        ("block_table", kwargs["block_table"][0]),
        ("slot_mapping", kwargs["slot_mapping"].int()),
        ("positions", kwargs["positions"].int()),
        ("loop", kwargs["loop"].long()),
        ("copies", kwargs["copies"].bool()),
        ("row_to_request", kwargs["row_to_request"][:1]),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            standin_fill(**(kwargs | {name: bad}))


def test_a_table_of_unlike_layers_is_refused(device):
    k = [torch.zeros(4, 2, 1, 16, device=device) for _ in range(2)]
    with pytest.raises(ValueError, match=r"^k_caches: "):
        CacheTable([], [])
    with pytest.raises(ValueError, match=r"^v_caches: "):
        CacheTable(k, k[:1])
    with pytest.raises(ValueError, match=r"^v_caches\[1\]: expected shape"):
        CacheTable(k, [k[0], k[1][:, :1]])
    with pytest.raises(ValueError, match=r"^k_caches\[1\]: strides"):
        CacheTable([k[0], torch.zeros(4, 4, 1, 16, device=device)[:, ::2]], k)
