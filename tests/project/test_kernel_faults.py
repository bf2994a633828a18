"""The list of faults that kernel tests must catch is true to the kernels; one is tried."""

from __future__ import annotations

import pytest

from scripts.check_kernel_faults import KERNELS, caught, occurrences
from tests.kernels.faults import FAULTS


def test_every_kernel_has_faults() -> None:
    kernels = {path.parent.name for path in (KERNELS / "ouro_kernels").glob("*/triton.py")}
    assert set(FAULTS) == kernels
    assert sum(map(len, FAULTS.values())) >= 40


@pytest.mark.parametrize(
    ("kernel", "right", "wrong"), [(k, *fault) for k, faults in FAULTS.items() for fault in faults]
)
def test_the_source_says_what_the_fault_replaces(kernel: str, right: str, wrong: str) -> None:
    assert occurrences(kernel, right) == 1 and right != wrong


def test_a_fault_is_caught_and_none_is_not() -> None:
    right, wrong = FAULTS["rope_kv_write"][0]
    assert caught("rope_kv_write", right, wrong)
    assert not caught("rope_kv_write", right, right)
