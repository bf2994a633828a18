"""The calls that aot.py compiles and the benchmark times, at a small size."""

import warnings
from importlib import import_module

import pytest
import torch

import ouro_kernels
from ouro_kernels.cases import Shape, cases
from tests.kernels.support import check_against_reference

SMALL = Shape(rows=3, context=19, hidden=64, q_heads=4, kv_heads=4, head_dim=32, layers=2, vocab=32)
EMPTY = Shape(rows=0, context=19, hidden=64, q_heads=4, kv_heads=4, head_dim=32, layers=2, vocab=32)


def _name(case):
    return f"{case.function} {case.variant}".strip()


@pytest.mark.parametrize("shape", [SMALL, EMPTY], ids=["three rows", "no rows"])
def test_every_case_matches_the_reference(shape, device):
    for case in cases(shape):
        check_against_reference(case.op, case.function, **case.make(device))


def test_bytes_grow_with_rows():
    double = Shape(**(vars(SMALL) | {"rows": 2 * SMALL.rows}))
    for one, two in zip(cases(SMALL), cases(double), strict=True):
        assert _name(one) == _name(two)
        assert 0 < one.bytes < two.bytes, _name(one)


def test_every_op_has_a_case_and_a_reference():
    functions = {name for name in ouro_kernels.__all__ if name.islower()} - {"choose_splits"}
    assert {case.function for case in cases(SMALL)} == functions
    for case in cases(SMALL):
        assert callable(getattr(import_module(f"ouro_kernels.{case.op}.reference"), case.function))


@pytest.mark.gpu
def test_every_op_replays_in_a_graph_without_a_host_read(device):
    """What a captured pass needs: fixed grids, and nothing that waits for the device."""
    for case in cases(SMALL):
        function = getattr(ouro_kernels, case.function)
        torch.manual_seed(1)
        kwargs = case.make(device)
        function(**kwargs)  # compile outside the capture
        torch.manual_seed(1)
        fresh = case.make(device)
        tensors = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "a prototype feature"
                torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.graph(graph):
                function(**kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for key, value in tensors.items():
            value.copy_(fresh[key])
        graph.replay()
        reference = getattr(import_module(f"ouro_kernels.{case.op}.reference"), case.function)
        reference(**fresh)
        for key, value in tensors.items():
            torch.testing.assert_close(value.float(), fresh[key].float(), rtol=0.02, atol=0.02)
