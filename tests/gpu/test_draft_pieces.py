"""Steps with drafts bring what steps without bring, whoever shares them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm import SamplingParams

from ouro_runtime.engine.cuda.draft_choice import KINDS
from tests.gpu.device import DRAW, LANES, SLOTS, VOCAB, Device

pytestmark = pytest.mark.usefixtures("drawn")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*DRAW)


def asked(rng: random.Random, loops: int) -> dict[str, Any]:
    low = rng.randint(1, loops)
    lossless = {"exit_mode": "lossless"}
    return rng.choice(
        [
            lossless,
            lossless | {"exit_threshold": rng.choice([0.0, 0.2, 0.5, 0.9])},
            lossless | {"exit_threshold": 0.3, "min_loops": low},
            lossless | {"exit_threshold": 1.0, "max_loops": low},
            lossless | {"forced_depths": [low]},
            {"exit_threshold": rng.choice([0.0, 0.3, 0.6])},
            {"exit_threshold": 0.4, "exit_mode": "exact"},
            {"exit_threshold": 0.4, "exit_mode": "exact", "max_loops": low},
            {"exit_threshold": 0.4, "max_loops": low},
            {"exit_threshold": 0.4, "exit_mode": "shared"},
            {"exit_threshold": 1.0},
            {"forced_depths": [low, 1, loops]},
        ]
    )


def sampling(rng: random.Random, depth: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        max_tokens=rng.randint(1, 20),
        temperature=rng.choice([0.0, 0.5, 2.0]),
        seed=rng.randrange(99),
        ignore_eos=True,
        stop_token_ids=[rng.randrange(VOCAB)] if rng.random() < 0.3 else None,
        extra_args=depth,
    )


def full(params: SamplingParams) -> SamplingParams:
    """As `params`, a lossless request at full depth."""
    params = params.clone()
    if (params.extra_args or {}).get("exit_mode") == "lossless":
        params.extra_args = {"exit_threshold": 1.0}
    return params


def drafts(rng: random.Random, device: Device, names: list[str]) -> dict[str, int]:
    """Some of them, as far as there are lanes, at any loop and class."""
    room = (LANES - len(names)) // max(1, device.loops - 1)
    some = [name for name in names if rng.random() < 0.8][:room]
    guided = {n: device.running[n].params.extra_args == {"exit_mode": "lossless"} for n in some}
    bits = (device.loops - 1) * KINDS
    return {n: rng.getrandbits(bits) if guided[n] else 0 for n in some if device.loops > 1}


@pytest.mark.parametrize("seed", range(5))
def test_a_crowd_brings_what_each_brings_at_full_depth(seed: int) -> None:
    """Requests of every mode come and go, sit out steps, change places; drafts are allowed now and
    then; slots are taken over."""
    rng = random.Random(seed)
    loops, gate = rng.choice([1, 2, 3, 4, 6]), rng.choice([-2.0, 0.0, 1.0])
    device, lone = Device(loops, seed, gate), Device(loops, seed, gate)
    free, seen, made, right, dropped = list(range(SLOTS)), 0, 0, 0, 0
    while seen < 14 or device.running:
        if free and seen < 14 and rng.random() < 0.6:
            params, token = sampling(rng, asked(rng, loops)), rng.randrange(VOCAB)
            device.add(str(seen), free.pop(rng.randrange(len(free))), token, params)
            seen += 1
        names = [name for name in device.running if rng.random() < 0.85]
        rng.shuffle(names)
        if not names:
            continue
        chosen = drafts(rng, device, names) if rng.random() < 0.8 else {}
        device.step(names, chosen, pads=rng.choice([0, 0, 3]))
        for name in names:
            request = device.running[name]
            if not request.over:
                continue
            del device.running[name]
            device.requests.leave(name)
            device.requests.forget([name])
            free.append(request.slot)
            first = lone.add(name, 0, request.first, full(request.params))
            while not first.over:
                lone.step([name], {})
            assert request.tokens == first.tokens, (name, request.params)
            if request.params.extra_args.get("exit_mode") != "lossless":
                assert request.notes == first.notes, (name, request.params)
                continue
            for depth, ran, drafted, lost in request.notes:
                assert depth in (drafted, loops) and ran >= loops
                made, right = made + bool(drafted), right + (0 < drafted == depth)
                dropped += lost
    assert not device.requests._flights
    assert all(cache[0].isnan().all() for cache in device.caches), "a page that nobody has"
    if loops > 2:
        assert right and made > right and dropped, (made, right, dropped)


@pytest.mark.parametrize("loops", [2, 4, 6])
@pytest.mark.parametrize("held", [0.0, 0.3])
def test_what_was_run_is_what_is_billed(loops: int, held: float) -> None:
    """Cells, and drafts, those that were dropped included, whether by a wrong draft or by a step
    without drafts."""
    rng = random.Random(loops)
    for seed in range(2):
        device = Device(loops, seed)
        params = sampling(rng, {"exit_mode": "lossless", "exit_threshold": 0.3})
        params.stop_token_ids, params.max_tokens = None, 16
        request = device.add("a", 2, 1, params)
        while not request.over:
            device.step(["a"], {} if rng.random() < held else {"a": 0})
        assert sum(ran for _, ran, _, _ in request.notes) == device.cells
        assert request.notes[-1][2] == 0, "a draft of the last token starts nothing"


def test_every_right_draft_saves_what_it_can() -> None:
    """All drafts right after the first loop: one token a pass."""
    device = Device(4, 0)
    device.table.zero_()  # every position says the same, at every loop
    params = SamplingParams(
        max_tokens=20,
        temperature=0.0,
        ignore_eos=True,
        extra_args={"exit_mode": "lossless", "exit_threshold": 0.0},
    )
    request = device.add("a", 0, 0, params)
    brought = [0]
    while not request.over:
        device.step(["a"], {"a": 0})
        brought.append(len(request.tokens))
    assert brought == [0, 1, 5, 9, 13, 17, 20]
    assert [depth for depth, *_ in request.notes] == [1] * 19 + [4]


def test_the_capture_runs_nobody() -> None:
    """Pieces run as they are before the first request: with zeros for parameters."""
    device = Device(4, 0)
    for lanes in (LANES, 4):
        for run in device.engine.capturable(drafts=True).values():
            run(lanes)
    b, drafts = device.buffers, device.buffers.drafts
    assert drafts is not None
    assert not b.carried_loop.any() and not drafts.carried_alive.any()
    assert all(cache.isnan().all() for cache in device.caches)
