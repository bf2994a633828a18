import pytest
import torch

from ouro_kernels import read_out
from tests.kernels.support import NORM_DTYPES, check_against_reference, strided_rows


def _inputs(rows, vocab, hidden, dtype, device, mask="ragged"):
    index = torch.arange(rows, device=device)
    return {
        "hidden": torch.randn(rows, hidden, device=device).to(dtype),
        "weight": (torch.randn(vocab, hidden, device=device) / hidden**0.5).to(dtype),
        "read_mask": {"none": index < 0, "all": index >= 0, "ragged": index % 5 == 1}[mask],
    }


@pytest.mark.parametrize("dtype", NORM_DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab", "hidden"),
    [(0, 16, 16), (1, 1, 16), (2, 111, 111), (17, 300, 70), (33, 129, 260), (130, 200, 33)],
)
@pytest.mark.parametrize("mask", ["all", "ragged"])
def test_matches_the_reference(rows, vocab, hidden, mask, dtype, device):
    check_against_reference(
        "read_out", "read_out", **_inputs(rows, vocab, hidden, dtype, device, mask)
    )


@pytest.mark.parametrize("rows", [1, 40, 130])
def test_where_nobody_is_read_out_neither_states_nor_vocabulary_reach_the_result(rows, device):
    kwargs = _inputs(rows, 100, 48, torch.bfloat16, device, "none")
    for name in ("hidden", "weight"):
        kwargs[name].fill_(float("nan"))
    assert not read_out(**kwargs).any()


def test_rows_that_are_not_read_out_are_zeros_whatever_they_hold(device):
    """A tile of such rows among others (128 rows are one), and such rows within a tile."""
    kwargs = _inputs(300, 70, 40, torch.float32, device, "all")
    kwargs["read_mask"][130:270] = False
    kwargs["read_mask"][5] = False
    kwargs["hidden"][~kwargs["read_mask"]] = float("nan")
    logits = check_against_reference("read_out", "read_out", **kwargs)
    assert not logits[~kwargs["read_mask"]].any()
    assert (logits[kwargs["read_mask"]] != 0).any(1).all()


def test_strided_rows(device):
    kwargs = _inputs(19, 67, 50, torch.float16, device)
    for name in ("hidden", "weight"):
        kwargs[name] = strided_rows(kwargs[name])
    check_against_reference("read_out", "read_out", **kwargs)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("hidden", torch.zeros(3, 8, dtype=torch.int32)),
        ("weight", torch.zeros(5, 7)),
        ("weight", torch.zeros(5, 8, dtype=torch.float16)),
        ("read_mask", torch.zeros(3)),
        ("read_mask", torch.zeros(4, dtype=torch.bool)),
    ],
)
def test_a_bad_argument_is_named(name, bad):
    kwargs = _inputs(3, 5, 8, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"^{name}: "):
        read_out(**(kwargs | {name: bad}))
