import pytest
import torch

from ouro_kernels import next_pass
from tests.kernels.support import check_against_reference, strided_rows

T, BLOCK_SIZE, REQUESTS, MAX_BLOCKS, VOCAB = 3, 4, 9, 7, 37


def _mask(kind, rows, device):
    index = torch.arange(rows, device=device)
    return {"none": index < 0, "all": index >= 0, "ragged": (index * 7) % 5 < 2}[kind]


def _inputs(rows, hidden, dtype, device, kind="ragged"):
    exits = _mask(kind, rows, device)
    tokens = torch.randint(0, VOCAB, (rows,), device=device)
    table = torch.randperm(T * REQUESTS * MAX_BLOCKS, device=device).int()
    last = MAX_BLOCKS * BLOCK_SIZE - 1
    return {
        "hidden": torch.randn(rows, hidden, device=device).to(dtype),
        "tokens": tokens,
        "embedding": torch.randn(VOCAB, hidden, device=device).to(dtype),
        "exit_mask": exits,
        "active": torch.ones(rows, dtype=torch.bool, device=device),
        "loop": torch.randint(0, T - 1, (rows,), device=device, dtype=torch.int32),
        "positions": torch.randint(0, last, (rows,), device=device),
        "survival": torch.rand(rows, device=device),
        "depth": torch.where(exits, 2, 0).int(),
        "block_table": table.view(T, REQUESTS, MAX_BLOCKS),
        "slot_mapping": torch.full((rows,), 7, device=device),
        "seq_lens": torch.full((rows,), 7, dtype=torch.int32, device=device),
        "row_to_request": torch.randint(0, REQUESTS, (rows,), device=device, dtype=torch.int32),
        "block_size": BLOCK_SIZE,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden"), [(0, 16), (1, 111), (23, 123)])
@pytest.mark.parametrize("kind", ["none", "all", "ragged"])
def test_matches_the_reference(rows, hidden, dtype, kind, device):
    check_against_reference("next_pass", "next_pass", **_inputs(rows, hidden, dtype, device, kind))


@pytest.mark.parametrize("positions", [torch.int32, torch.int64])
def test_every_option(positions, device):
    rows = 41
    kwargs = _inputs(rows, 100, torch.bfloat16, device)
    kwargs["hidden"] = strided_rows(kwargs["hidden"])
    kwargs["embedding"] = strided_rows(kwargs["embedding"], gap=32)
    kwargs["positions"] = kwargs["positions"].to(positions)
    kwargs["tokens"] = kwargs["tokens"].int()
    kwargs["active"] = torch.rand(rows, device=device) < 0.8
    kwargs["finished"] = torch.rand(rows, device=device) < 0.3
    kwargs["position_limit"] = kwargs["positions"] + torch.randint(
        0, 3, (rows,), device=device, dtype=positions
    )
    kwargs["run_all"] = torch.rand(rows, device=device) < 0.3
    kwargs["deepest"] = torch.randint(1, T + 1, (rows,), device=device, dtype=torch.int32)
    kwargs["fill_copies"] = torch.full((rows,), 9, dtype=torch.int32, device=device)
    was_active = kwargs["active"].clone()
    check_against_reference("next_pass", "next_pass", **kwargs)
    assert 0 < kwargs["active"].sum() < was_active.sum() < rows


def test_more_entries_than_one_tile(device):
    """Hidden sizes beyond the kernel's tile take its loop more than once."""
    kwargs = _inputs(2, 2100, torch.float32, device, "all")
    kwargs["block_table"] = torch.arange(T * 5000, dtype=torch.int32, device=device).view(T, 2, -1)
    kwargs["row_to_request"] = None
    kwargs["positions"][:] = torch.tensor([9998, 3])
    check_against_reference("next_pass", "next_pass", **kwargs)


def test_slots_beyond_32_bits(device):
    """Pages that fit, and slots that do not."""
    kwargs = _inputs(3, 8, torch.float32, device)
    pages = torch.tensor([2**29, 2**30, 2**31 - 1], device=device)
    kwargs["block_table"][:, :3] = pages[:, None]
    kwargs["row_to_request"][:] = torch.arange(3)
    check_against_reference("next_pass", "next_pass", **kwargs)
    assert (kwargs["slot_mapping"] >= 2**31).all()


def test_the_token_of_a_row_that_stays_is_not_looked_up(device):
    kwargs = _inputs(7, 16, torch.float32, device)
    kwargs["tokens"][~kwargs["exit_mask"]] = 2**40
    check_against_reference("next_pass", "next_pass", **kwargs)


def test_the_three_fates_of_a_row(device):
    """A row that stays, one that starts its next token, and one that ends."""
    kwargs = _inputs(3, 8, torch.float32, device, "all")
    kwargs["exit_mask"] = torch.tensor([False, True, True], device=device)
    kwargs["finished"] = torch.tensor([False, False, True], device=device)
    kwargs["loop"][:] = 1
    kwargs["positions"][:] = torch.tensor([3, 3, 3])
    kwargs["tokens"][1] = 5
    before = kwargs["hidden"].clone()
    table = kwargs["block_table"][:, kwargs["row_to_request"].long()].long()
    next_pass(**kwargs)
    assert kwargs["loop"].tolist() == [2, 0, 0]
    assert kwargs["positions"].tolist() == [3, 4, 4]
    assert kwargs["active"].tolist() == [True, True, False]
    assert kwargs["seq_lens"].tolist() == [4, 5, 0]
    assert kwargs["survival"][1:].tolist() == [1.0, 1.0]
    slots = [int(table[2, 0, 0]) * BLOCK_SIZE + 3, int(table[0, 1, 1]) * BLOCK_SIZE, -1]
    assert kwargs["slot_mapping"].tolist() == slots
    assert torch.equal(kwargs["hidden"][0], before[0])
    assert torch.equal(kwargs["hidden"][1], kwargs["embedding"][5])
    assert torch.equal(kwargs["hidden"][2], before[2])


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("hidden", torch.zeros(5, 16, dtype=torch.int32)),
        ("tokens", torch.zeros(5)),
        ("embedding", torch.zeros(VOCAB, 15)),
        ("exit_mask", torch.zeros(5, dtype=torch.uint8)),
        ("loop", torch.zeros(5, dtype=torch.int64)),
        ("survival", torch.zeros(4)),
        ("slot_mapping", torch.zeros(5, dtype=torch.int32)),
        ("position_limit", torch.zeros(5, dtype=torch.int32)),
        ("block_table", torch.zeros(REQUESTS, MAX_BLOCKS, dtype=torch.int32)),
        ("deepest", torch.zeros(5)),
        ("block_size", 0),
    ],
)
def test_a_bad_argument_is_named(name, bad):
    kwargs = _inputs(5, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"^{name}: "):
        next_pass(**(kwargs | {name: bad}))
