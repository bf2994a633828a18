"""The reference says what the released modeling code says."""

import pytest
import torch

from tests.engine.cases import CHECKPOINTS, NEAR, golden_cases, golden_records
from tests.engine.compare import assert_case
from tests.reference.model import MODES, Reference


@pytest.fixture(scope="module", params=CHECKPOINTS)
def golden(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(golden: str) -> Reference:
    return Reference(CHECKPOINTS[golden])


def test_gates_and_logits_after_every_loop(golden: str, reference: Reference) -> None:
    for record in golden_records(golden):
        gates, logits = reference.prompt_states(record["prompt"])
        last = {name: torch.tensor(values) for name, values in record["last_position"].items()}
        torch.testing.assert_close(gates[:, -1], last["lambda_by_loop"], atol=1e-5, rtol=0)
        torch.testing.assert_close(logits[:, -1], last["logits_by_loop"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_golden_generations(golden: str, reference: Reference, mode: str) -> None:
    for case in golden_cases(golden, (mode,)):
        run = reference.generate(case.prompt, len(case.tokens), threshold=case.threshold, mode=mode)
        assert_case(case, run.tokens, run.depths, run.logprobs)
        if case.margin >= NEAR and tuple(run.tokens) == case.tokens:
            ours = min(run.min_logit_margin, run.min_cdf_margin)
            assert abs(ours - case.margin) < 1e-4, f"{case.name}: margin {ours}, not {case.margin}"


def test_forced_depths_at_t_are_full_depth(reference: Reference, golden: str) -> None:
    prompt = golden_records(golden)[1]["prompt"]
    full = reference.generate(prompt, 8)
    for mode in ("exact", "skip", "shared"):
        forced = reference.generate(prompt, 8, mode=mode, forced_depths=[reference.loops])
        if mode == "shared":
            assert forced.tokens[0] == full.tokens[0]
        else:
            assert forced.tokens == full.tokens
        assert forced.depths == full.depths


def test_loop_limits_bound_every_depth(reference: Reference, golden: str) -> None:
    prompt = golden_records(golden)[2]["prompt"]
    run = reference.generate(prompt, 12, mode="skip", threshold=0.1, min_loops=2, max_loops=3)
    assert set(run.depths) <= {2, 3}
