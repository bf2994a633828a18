"""vLLM's own dry runs, before the first request."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

from tests.cuda import bench
from tests.engine.cases import golden_cases
from tests.engine.compare import assert_case
from tests.engine.harness import generate, greedy, runner_of


@bench.on("cramped")
def test_vllms_warm_up_requests_run_as_any_and_leave_nothing(llm: Any) -> None:
    """`_warmup_*` and `_v2_mixed_warmup_*`: plans that no scheduler made, with every sampler option
    and a grammar's bitmask; then a dummy run and the sampler on its states."""
    runner = runner_of(llm)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    seen: list[list[int]] = []

    def sample(grammar: Any) -> Any:
        output = worker.sample_tokens(grammar)
        seen.append([len(tokens) for tokens in output.get_output().sampled_token_ids])
        return output

    warmup_kernels(runner, worker.execute_model, sample)
    with torch.inference_mode():
        assert run_mixed_prefill_decode_warmup(runner, worker.execute_model, sample, 8)
    runner.profile_run()
    # A prompt brings one token, and so does a step at full depth.
    assert seen and {count for counts in seen for count in counts} == {1}, seen
    bench.assert_idle(llm)
    case = next(c for c in golden_cases("t4-mha", ("skip",)) if len(c.prompt) == 5)
    (out,) = generate(llm, [case.prompt], [greedy(len(case.tokens), case.depth_fields)])
    assert_case(case, out.tokens, out.depths, out.logprobs)
