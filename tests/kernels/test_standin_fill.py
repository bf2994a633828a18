import pytest
import torch

from ouro_kernels import CacheTable, standin_fill
from tests.kernels.support import check_against_reference, paged_caches

T, BLOCKS, BLOCK_SIZE, LAYERS = 4, 8, 3, 2
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)


def _inputs(rows, heads, head_dim, dtype, device, layout="HND"):
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
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    return {
        "table": CacheTable([k for k, _ in layers], [v for _, v in layers]),
        "slot_mapping": (block * T + loop) * BLOCK_SIZE + offset,
        "loop": loop,
        "total_loops": T,
    }


def _mask(kind, rows, device):
    index = torch.arange(rows, device=device)
    return {
        "none": index < 0,
        "all": index >= 0,
        "one": index == rows // 2,
        "ragged": (index * 7) % 5 < 2,
    }[kind]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(0, 2, 16), (1, 5, 24), (17, 3, 11)])
@pytest.mark.parametrize("kind", ["none", "all", "one", "ragged"])
def test_matches_the_reference(rows, heads, head_dim, dtype, kind, device):
    kwargs = _inputs(rows, heads, head_dim, dtype, device)
    kwargs["exit_mask"] = _mask(kind, rows, device)
    check_against_reference("standin_fill", "standin_fill", **kwargs)


@pytest.mark.parametrize("layout", ["HND", "NHD", "split", "unlike"])
def test_layouts_and_padding(layout, device):
    kwargs = _inputs(9, 2, 32, torch.bfloat16, device, layout)
    kwargs["exit_mask"] = _mask("all", 9, device)
    kwargs["slot_mapping"][::2] = -1
    check_against_reference("standin_fill", "standin_fill", **kwargs)


def test_many_heads_take_several_programs(device):
    kwargs = _inputs(3, 20, 128, torch.float32, device)
    kwargs["exit_mask"] = _mask("all", 3, device)
    check_against_reference("standin_fill", "standin_fill", **kwargs)


def test_only_deeper_loops_of_the_same_token_change(device):
    kwargs = _inputs(1, 1, 16, torch.float32, device)
    block, offset, loop = 3, 2, 1
    kwargs["slot_mapping"][0] = (block * T + loop) * BLOCK_SIZE + offset
    kwargs["loop"][0] = loop
    kwargs["exit_mask"] = _mask("all", 1, device)
    caches = (*kwargs["table"].k_caches, *kwargs["table"].v_caches)
    before = [cache.clone() for cache in caches]
    standin_fill(**kwargs)
    for cache, old in zip(caches, before, strict=True):
        changed = (cache != old).any(-1).any(-1).nonzero().tolist()
        assert changed == [[block * T + deeper, offset] for deeper in (2, 3)]
        for deeper in (2, 3):
            assert torch.equal(cache[block * T + deeper, offset], old[block * T + loop, offset])


def test_a_bad_argument_is_named(device):
    kwargs = _inputs(3, 2, 16, torch.float32, device)
    kwargs["exit_mask"] = _mask("all", 3, device)
    for name, bad in (
        ("slot_mapping", kwargs["slot_mapping"].int()),
        ("loop", kwargs["loop"].long()),
        ("exit_mask", kwargs["exit_mask"].int()),
        ("total_loops", 0),
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
