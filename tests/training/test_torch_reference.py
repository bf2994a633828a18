"""The cached reference against the model without a cache, and the exit rule by hand."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ouro_runtime.training.export import read_config
from ouro_runtime.training.model import LoopLM, LoopLMConfig
from ouro_runtime.training.reference import Controls, Reference, exit_depths, stand_in
from tests.reference.model import Reference as IndependentReference


@pytest.fixture(scope="module")
def model() -> LoopLM:
    torch.manual_seed(1)
    model = LoopLM(LoopLMConfig(50, 64, 96, 2, 2))
    torch.nn.init.normal_(model.lm_head.weight)
    torch.nn.init.normal_(model.model.early_exit_gate.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(5, 50) for _ in range(n)] for n in (1, 4, 9, 4)]


def plain(model: LoopLM, prompt: list[int], depth: int, count: int) -> list[int]:
    """Greedy tokens without any cache, read out at a fixed loop."""
    ids = list(prompt)
    for _ in range(count):
        bias = torch.full((len(ids), len(ids)), -1e9).triu(1)[None, None]
        with torch.no_grad():
            states = model(torch.tensor([ids]), bias)
            ids.append(int(model.lm_head(states[depth - 1, 0, -1]).argmax()))
    return ids[len(prompt) :]


def test_exit_depths_by_hand() -> None:
    # CDFs: 0.2, 0.6, 0.7 | 0.5, 0.5, 0.9 | 0, 0, 0
    lambdas = torch.tensor([[0.2, 0.5, 0.0], [0.5, 0.0, 0.0], [0.25, 0.8, 0.0], [0.9, 0.9, 0.9]])

    def depths(*args: float | int) -> list[int]:
        return exit_depths(lambdas, Controls(*args)).tolist()  # type: ignore[arg-type]

    assert depths(0.5) == [2, 1, 4]
    assert depths(0.65) == [3, 3, 4]
    assert depths(0.0) == [1, 1, 1]
    assert depths(0.5, 2) == [2, 2, 4]
    assert depths(0.5, 3) == [3, 3, 4]
    assert depths(0.65, 1, 2) == [2, 2, 2]
    assert depths(1.0) == [4, 4, 4]
    assert depths(1.0, 1, 3) == [3, 3, 3]


def test_threshold_one_is_off_even_when_the_cdf_rounds_to_one() -> None:
    assert exit_depths(torch.ones(4, 2), Controls(1.0)).tolist() == [4, 4]


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("mode", ["skip", "exact"])
def test_fixed_depth_equals_no_cache(
    model: LoopLM, prompts: list[list[int]], depth: int, mode: str
) -> None:
    tokens, depths = Reference(model).generate(
        prompts, Controls(max_loops=depth, exit_mode=mode), 6, stop=()
    )
    assert tokens == [plain(model, p, depth, 6) for p in prompts]
    assert depths == [[depth] * 6] * len(prompts)


@pytest.mark.parametrize("mode", ["skip", "exact", "shared"])
def test_batched_equals_serial(model: LoopLM, prompts: list[list[int]], mode: str) -> None:
    reference, controls = Reference(model), Controls(0.5, exit_mode=mode)
    tokens, depths = reference.generate(prompts, controls, 8, stop=())
    assert len({d for row in depths for d in row}) > 1, "the gate must decide something here"
    for i, prompt in enumerate(prompts):
        assert ([tokens[i]], [depths[i]]) == reference.generate([prompt], controls, 8, stop=())


def test_modes_write_what_they_say(model: LoopLM, prompts: list[list[int]]) -> None:
    """After an exit at loop 2, the newest column of each loop."""
    cache, _ = Reference(model).prefill(prompts, 2)
    depth = torch.tensor([2, 1, 4, 3])
    for mode, slots in {
        "skip": ([0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 2, 3], [0, 1, 2, 2]),
        "shared": ([1] * 4, [0] * 4, [3] * 4, [2] * 4),
        "exact": ([0, 1, 2, 3],) * 4,
    }.items():
        after = cache.copy()
        stand_in(after, depth, mode)
        last = cache.used - 1
        for row, planes in enumerate(slots):
            for t, source in enumerate(planes):
                assert torch.equal(after.k[t, :, row, :, last], cache.k[source, :, row, :, last])
                assert torch.equal(after.v[t, :, row, :, last], cache.v[source, :, row, :, last])
        assert torch.equal(after.k[..., :last, :], cache.k[..., :last, :])


def test_decode_stops_at_a_stop_token_and_leaves_the_prefill_alone(
    model: LoopLM, prompts: list[list[int]]
) -> None:
    reference = Reference(model)
    start = reference.prefill(prompts, 8)
    free, _ = reference.decode(start, Controls(), 8, stop=())
    stop = free[0][3]
    tokens, depths = reference.decode(start, Controls(), 8, stop=(stop,))
    for short, long, depth in zip(tokens, free, depths, strict=True):
        assert short == (long[: long.index(stop) + 1] if stop in long else long)
        assert len(depth) == len(short)
    assert reference.decode(start, Controls(), 8, stop=())[0] == free


GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "t4-mha"


@pytest.mark.parametrize("mode", ["full", "exact", "skip", "shared"])
def test_released_code_agrees(mode: str) -> None:
    """Tokens and depths of the released modeling code, where no near-tie could flip them."""
    model = LoopLM(read_config(GOLDEN))
    model.load_state_dict(load_file(GOLDEN / "model.safetensors"))
    records = json.loads((GOLDEN / "golden.json").read_text())["records"]
    prompts = [r["prompt"] for r in records]
    compared = 0
    for q in ("1",) if mode == "full" else tuple(records[0][mode]):
        controls = Controls(float(q), exit_mode="exact" if mode == "full" else mode)
        tokens, depths = Reference(model).generate(prompts, controls, 24, stop=())
        for i, record in enumerate(records):
            want = record["full"] if mode == "full" else record[mode][q]
            if min(want["min_logit_margin"], want.get("min_cdf_margin") or 1.0) < 1e-4:
                continue
            assert tokens[i] == want["tokens"], (q, i)
            assert depths[i] == want["depths"], (q, i)
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("mode", ["exact", "skip"])
@pytest.mark.parametrize(
    ("rule", "thresholds"), [("margin", (0.002, 0.005, 0.01)), ("delta", (0.6, 0.8, 1.0))]
)
def test_the_other_rules_are_those_of_the_tests_own_reference(
    rule: str, thresholds: tuple[float, ...], mode: str
) -> None:
    """Two codes that share none, where no near-tie could flip them."""
    model = LoopLM(read_config(GOLDEN))
    model.load_state_dict(load_file(GOLDEN / "model.safetensors"))
    independent = IndependentReference(GOLDEN)
    prompts = [r["prompt"] for r in json.loads((GOLDEN / "golden.json").read_text())["records"]][:3]
    seen = set()
    for q in thresholds:
        controls = Controls(q, exit_mode=mode, exit_rule=rule)
        tokens, depths = Reference(model).generate(prompts, controls, 10, stop=())
        for prompt, token, depth in zip(prompts, tokens, depths, strict=True):
            want = independent.generate(prompt, 10, threshold=q, rule=rule, mode=mode)
            sure = next((i for i in range(10) if want.margin(i) < 1e-4), 10)
            assert token[:sure] == want.tokens[:sure]
            assert depth[:sure] == want.depths[:sure]
            seen |= set(depth[:sure])
    assert len(seen) >= 3


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_training_with_stand_ins_sees_what_mode_skip_serves(
    model: LoopLM, prompts: list[list[int]], threshold: float
) -> None:
    """In one parallel forward: the tokens and depths of token-by-token decoding in `skip`."""
    tokens, depths = Reference(model).generate(prompts, Controls(threshold), 12)
    assert len({d for row in depths for d in row}) > 1, "all at one depth: nothing is tested"
    for prompt, made, depth in zip(prompts, tokens, depths, strict=True):
        ids = torch.tensor([prompt + made[:-1]])
        bias = torch.full((ids.shape[1],) * 2, -1e9).triu(1)[None, None]
        leaves = torch.ones(ids.shape)
        leaves[:, len(prompt) :] = threshold
        pick = torch.arange(len(prompt) - 1, ids.shape[1])
        with torch.no_grad():
            states = model(ids, bias, pick, leaves)
            exits = exit_depths(torch.sigmoid(model.gate(states)), Controls(threshold))
            picked = states[exits - 1, torch.arange(len(pick))]
        assert exits.tolist() == depth
        assert model.lm_head(picked).argmax(-1).tolist() == made
