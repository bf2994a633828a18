"""Aborts in any pass leave nothing behind."""

from __future__ import annotations

import random
from typing import Any

from tests.engine.cases import CHECKPOINTS, golden_cases
from tests.engine.compare import assert_case
from tests.engine.harness import assert_idle, engine, generate, greedy, runner_of, scheduler_of

ABORTS = 1000
ALIVE = 10


def test_a_thousand_random_aborts_leave_nothing_behind() -> None:
    rng = random.Random(5)
    cases = golden_cases("t4-mha")
    options: dict[str, Any] = {
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "enable_prefix_caching": True,
        "blocks": 23,
    }
    carried_when_aborted = aborted = born = 0
    alive: dict[str, str] = {}
    with engine(CHECKPOINTS["t4-mha"], **options) as llm:
        runner = runner_of(llm)
        while aborted < ABORTS:
            while len(alive) < ALIVE:
                case, name = rng.choice(cases), f"r{born}"
                params = greedy(rng.randint(2, 30), case.depth_fields)
                request = {"prompt_token_ids": list(case.prompt)}
                alive[name] = llm.llm_engine.add_request(name, request, params)
                born += 1
            for answer in llm.llm_engine.step():
                if answer.finished:
                    alive.pop(answer.request_id, None)
            gone = rng.sample(sorted(alive), k=min(len(alive), rng.randint(0, 6)))
            for name in gone:
                inner = alive.pop(name)
                known = runner.loop_requests.get(inner) or runner.loop_requests.get(name)
                carried_when_aborted += bool(known and known.carried)
            half = len(gone) // 2
            llm.llm_engine.abort_request(gone[:half])
            # The others leave while the next step runs, as they do in a server.
            inner_names = llm.llm_engine.output_processor.abort_requests(gone[half:], False)
            llm.llm_engine.engine_core.engine_core.aborts_queue.put_nowait(inner_names)
            aborted += len(gone)
        llm.llm_engine.abort_request(list(alive))
        while scheduler_of(llm).requests:
            llm.llm_engine.engine_core.engine_core.step_fn()
        assert_idle(llm)
        assert carried_when_aborted > ABORTS // 20, "too few were aborted in the middle of a token"
        outputs = generate(
            llm,
            [case.prompt for case in cases],
            [greedy(len(case.tokens), case.depth_fields) for case in cases],
        )
        for case, out in zip(cases, outputs, strict=True):
            assert_case(case, out.tokens, out.depths, out.logprobs)
        assert_idle(llm)
