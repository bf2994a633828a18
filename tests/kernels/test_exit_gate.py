import pytest
import torch

from ouro_kernels import exit_gate
from tests.kernels.support import NORM_DTYPES, check_against_reference, strided_rows

T = 4


def _int(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def _state(rows, hidden, dtype, device):
    """A pass of random rows at random loops, thresholds well away from any survival."""
    survival = torch.rand(rows, device=device)
    levels = torch.tensor([0.0, 0.25, 0.5, 0.999, 1.0, 2.0], device=device)
    return {
        "h": torch.randn(rows, hidden, device=device).to(dtype),
        "weight": (torch.randn(hidden, device=device) / hidden**0.5).to(dtype),
        "bias": torch.full((1,), -0.3, device=device).to(dtype),
        "survival": survival,
        "depth": torch.zeros(rows, dtype=torch.int32, device=device),
        "loop": torch.randint(0, T, (rows,), device=device, dtype=torch.int32),
        "threshold": levels[torch.randint(0, len(levels), (rows,), device=device)],
        "min_loops": torch.randint(1, T + 1, (rows,), device=device, dtype=torch.int32),
        "max_loops": torch.randint(1, T + 1, (rows,), device=device, dtype=torch.int32),
        "total_loops": T,
    }


@pytest.mark.parametrize("dtype", NORM_DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(0, 64), (1, 111), (123, 111), (40, 128)])
def test_matches_the_reference(rows, hidden, dtype, device):
    state = _state(rows, hidden, dtype, device)
    check_against_reference("exit_gate", "exit_gate", **state)


@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("kind", ["none", "all", "ragged"])
def test_exits(kind, rows, device):
    """Nobody leaves, everybody does, or some do."""
    state = _state(rows, 64, torch.float32, device)
    rises = torch.arange(rows, device=device) % 3 == 0
    leaving = {"none": rises & False, "all": rises | True, "ragged": rises}[kind]
    state["loop"] = torch.zeros_like(state["loop"])
    state["min_loops"] = torch.ones_like(state["loop"])
    state["max_loops"] = torch.full_like(state["loop"], T)
    state["threshold"] = torch.where(leaving, 0.0, 1.0)
    exits, reads = check_against_reference("exit_gate", "exit_gate", **state)
    assert torch.equal(exits, leaving)
    assert torch.equal(reads, leaving)


def test_masks_and_strided_states(device):
    state = _state(61, 123, torch.bfloat16, device)
    state["h"] = strided_rows(state["h"])
    state["run_all"] = torch.rand(61, device=device) < 0.4
    state["deepest"] = torch.randint(1, T + 1, (61,), device=device, dtype=torch.int32)
    state["active"] = torch.rand(61, device=device) < 0.6
    state["depth"] = torch.where(state["run_all"], state["loop"] // 2, 0).int()
    state["history"] = strided_rows(torch.full((61, T), float("nan"), device=device))
    state["h"][~state["active"]] = float("nan")
    exits, reads = check_against_reference("exit_gate", "exit_gate", **state)
    assert 0 < exits.sum() < 61
    assert 0 < reads.sum() < 61
    assert not (exits & ~state["active"]).any()
    kept = state["history"].isfinite()
    assert torch.equal(kept.sum(1), state["active"].long())
    assert torch.equal(state["history"][kept], state["survival"][state["active"]])


def test_given_outputs_are_written(device):
    state = _state(9, 64, torch.float32, device)
    given = {name: torch.ones(9, dtype=torch.bool, device=device) for name in ("a", "b")}
    result = exit_gate(**state, exit_mask=given["a"], read_mask=given["b"])
    assert result[0] is given["a"]
    assert result[1] is given["b"]
    assert not given["a"].all()


@pytest.mark.parametrize("name", ["exit_mask", "read_mask"])
def test_one_given_output_is_written(name, device):
    state = _state(9, 64, torch.float32, device)
    state[name] = torch.ones(9, dtype=torch.bool, device=device)
    check_against_reference("exit_gate", "exit_gate", **state)


def _walk(bias, device, *, threshold, min_loops=1, max_loops=T, run_all=False, deepest=T):
    """Depth, and loops run, of one token whose gate always says sigmoid(bias)."""
    state = {
        "h": torch.zeros(1, 8, device=device),
        "weight": torch.zeros(8, device=device),
        "bias": torch.tensor([bias], device=device),
        "survival": torch.ones(1, device=device),
        "depth": _int([0], device),
        "threshold": torch.tensor([threshold], device=device),
        "min_loops": _int([min_loops], device),
        "max_loops": _int([max_loops], device),
        "run_all": torch.tensor([run_all], device=device),
        "deepest": _int([deepest], device),
    }
    for loop in range(T):
        exits, reads = exit_gate(**state, loop=_int([loop], device), total_loops=T)
        assert bool(reads[0]) == (int(state["depth"][0]) == loop + 1)
        if exits[0]:
            return int(state["depth"][0]), loop + 1
    raise AssertionError("never left")


@pytest.mark.parametrize(
    ("rule", "depth"),
    [
        ({"threshold": 0.4}, 1),  # CDF 0.5, 0.75, 0.875 after loops 1, 2, 3
        ({"threshold": 0.5}, 1),
        ({"threshold": 0.51}, 2),
        ({"threshold": 0.875}, 3),
        ({"threshold": 0.9}, 4),
        ({"threshold": 0.0}, 1),
        ({"threshold": 1.0}, 4),
        ({"threshold": 0.1, "min_loops": 3}, 3),
        ({"threshold": 1.0, "max_loops": 2}, 2),
        ({"threshold": 0.9, "min_loops": 4, "max_loops": 1}, 1),
    ],
)
def test_the_rule(rule, depth, device):
    assert _walk(0.0, device, **rule) == (depth, depth)
    assert _walk(0.0, device, **rule, run_all=True) == (depth, T)


@pytest.mark.parametrize("run_all", [False, True])
def test_the_last_loop_of_a_row_is_its_own(run_all, device):
    assert _walk(0.0, device, threshold=1.0, run_all=run_all, deepest=2) == (2, 2)
    depth, ran = _walk(0.0, device, threshold=0.4, run_all=run_all, deepest=3)
    assert (depth, ran) == (1, 3 if run_all else 1)


def test_a_saturated_gate_does_not_leave_at_threshold_one(device):
    assert _walk(100.0, device, threshold=1.0) == (T, T)
    assert _walk(100.0, device, threshold=0.999) == (1, 1)


def test_a_nan_gate_runs_every_loop(device):
    assert _walk(float("nan"), device, threshold=0.1) == (T, T)


@pytest.mark.parametrize("name", ["survival", "depth", "loop", "threshold", "min_loops"])
def test_a_bad_argument_is_named(name, device):
    state = _state(4, 16, torch.float32, device)
    with pytest.raises(ValueError, match=f"^{name}: expected dtype"):
        exit_gate(**(state | {name: state[name].double()}))
    with pytest.raises(ValueError, match=f"^{name}: expected shape"):
        exit_gate(**(state | {name: state[name][1:]}))
