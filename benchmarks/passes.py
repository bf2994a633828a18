"""Where the time of our engine's passes goes, from the reports it makes of every step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class PassProfile:
    """Collects step reports of an in-process engine between `__enter__` and `__exit__`."""

    def __init__(self, llm: Any) -> None:
        core = llm.llm_engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.passes = self.rows = self.steps = self.tokens = 0
        self.step_seconds = 0.0
        self._on = False

    def __enter__(self) -> PassProfile:
        sample_tokens = self.runner.sample_tokens
        model = type(self.runner.model)
        compute_logits = model.compute_logits

        def collecting(*args: Any, **kwargs: Any) -> Any:
            output = sample_tokens(*args, **kwargs)
            report = getattr(output, "ouro", None)
            if self._on and report is not None:
                report = report.report
                for part, value in report.seconds.items():
                    self.seconds[part] += value
                self.passes += len(report.pass_rows)
                self.rows += sum(report.pass_rows)
                self.tokens += report.tokens
            return output

        def timed(model: Any, hidden: Any) -> Any:
            began = time.perf_counter()
            logits = compute_logits(model, hidden)
            if self._on:
                self.seconds["lm_head"] += time.perf_counter() - began
            return logits

        self.runner.sample_tokens = collecting
        model.compute_logits = timed
        self._undo = (model, compute_logits)
        return self

    def __exit__(self, *_: object) -> None:
        del self.runner.sample_tokens
        model, compute_logits = self._undo
        model.compute_logits = compute_logits

    def start(self) -> None:
        """Collect from here on."""
        self._on = True

    def step(self, run: Callable[[], None]) -> None:
        """Run and time one engine step."""
        began = time.perf_counter()
        run()
        self.step_seconds += time.perf_counter() - began
        self.steps += 1

    def report(self) -> dict[str, float]:
        """Milliseconds per pass by part; shares of a pass; rows per pass and tokens per step.

        `sample` is the read-out without the matrix product with the vocabulary (`lm_head`); `step`
        is what an engine step costs outside its passes, spread over them.
        """
        seconds = dict(self.seconds)
        lm_head = seconds.pop("lm_head", 0.0)
        seconds["sample"] = seconds.pop("read_out") - lm_head
        inside = sum(seconds.values()) + lm_head
        outside_block = inside - lm_head - seconds["block"]
        parts = seconds | {"lm_head": lm_head, "step": self.step_seconds - inside}
        return {f"{name}_ms": 1e3 * value / self.passes for name, value in parts.items()} | {
            "outside_block_share": outside_block / inside,
            "rows_per_pass": self.rows / self.passes,
            "passes_per_token": self.passes / self.tokens,
            "tokens_per_step": self.tokens / self.steps,
        }
