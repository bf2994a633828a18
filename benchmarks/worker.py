"""One engine in a process of its own, driven by JSON lines: a request on stdin, a reply on stdout.

Requests name one of the functions in `COMMANDS` and its arguments. The engine runs in this process
(no engine-core process), bound to the cores that the parent chose.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from benchmarks.passes import PassProfile

END = 10_000_000
"""Tokens of a request that is to run until it is aborted; clipped to what the context holds."""


class Worker:
    """An engine and what can be measured on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        overrides = None
        if options.engine == "baseline":
            from benchmarks import baseline

            overrides = baseline.register()
        else:
            from ouro_runtime.plugin import register

            register()
        from vllm import LLM

        self.llm = LLM(
            model=options.model,
            dtype=options.dtype,
            hf_overrides=overrides,
            skip_tokenizer_init=True,
            enforce_eager=options.eager,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            num_gpu_blocks_override=options.pages,
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=0,
        )
        self.engine = self.llm.llm_engine
        self.context = self.engine.vllm_config.model_config.max_model_len
        self.number = 0

    def _add(self, prompt: list[int], tokens: int, extra: dict[str, Any] | None) -> str:
        from vllm import SamplingParams

        self.number += 1
        params = SamplingParams(
            temperature=0.0,
            max_tokens=min(tokens, self.context - len(prompt) - 1),
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
        name = str(self.number)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def _step(self, progress: dict[str, int], depths: dict[str, list[int]] | None = None) -> None:
        """One engine step; `progress` maps requests to their tokens so far."""
        for answer in self.engine.step():
            out = answer.outputs[0]
            progress[answer.request_id] = len(out.token_ids)
            if depths is not None:
                depths[answer.request_id] = list(getattr(out, "depths", ()))

    def generate(
        self,
        prompts: list[list[int]],
        tokens: int,
        extra: list[Any],
        prompt_logprobs: int | None = None,
    ) -> dict[str, Any]:
        """Tokens and depths of a batch."""
        from vllm import SamplingParams

        answers = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=tokens,
                    ignore_eos=True,
                    extra_args=fields,
                    prompt_logprobs=prompt_logprobs,
                )
                for fields in extra
            ],
            use_tqdm=False,
        )
        outputs = [answer.outputs[0] for answer in answers]
        return {
            "tokens": [list(out.token_ids) for out in outputs],
            "depths": [list(getattr(out, "depths", ())) for out in outputs],
        }

    def decode(self, prompts: list[list[int]], tokens: int, extra: list[Any]) -> dict[str, Any]:
        """Decode rate, from when all first tokens are out to the end; also the whole duration."""
        progress: dict[str, int] = {}
        began = time.perf_counter()
        names = [self._add(p, tokens, e) for p, e in zip(prompts, extra, strict=True)]
        while len(progress) < len(names):
            self._step(progress)
        started, before = time.perf_counter(), sum(progress.values())
        while self.engine.has_unfinished_requests():
            self._step(progress)
        ended = time.perf_counter()
        produced = sum(progress.values())
        assert produced == tokens * len(names), (produced, tokens, len(names))
        return {
            "rate": (produced - before) / (ended - started),
            "overall": produced / (ended - began),
        }

    def fill(
        self, prompts: list[list[int]], tokens: int, steps: int, extra: dict[str, Any]
    ) -> dict[str, Any]:
        """Start requests until one has to wait for room, then decode for so many steps.

        Args:
            prompts: more than fit. tokens: of each request, more than it gets to generate.

        Returns:
            Requests that run at once, the pages they hold by loop, and the tokens per second of
            the whole batch; our engine only.
        """
        from ouro_runtime.engine.pages import pages_held

        scheduler = self.engine.engine_core.engine_core.scheduler
        progress: dict[str, int] = {}
        names = [self._add(prompt, tokens, extra) for prompt in prompts]
        running = -1
        while not running == len(scheduler.running) == len(progress):
            running = len(scheduler.running)
            self._step(progress)
        assert scheduler.waiting, "every request found room: ask for more"
        began, before = time.perf_counter(), sum(progress.values())
        for _ in range(steps):
            self._step(progress)
        seconds = time.perf_counter() - began
        assert len(scheduler.running) == running, "somebody was preempted, or came in late"
        produced = sum(progress.values()) - before
        pages = pages_held(scheduler.kv_cache_manager)
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return {"requests": running, "pages": pages, "rate": produced / seconds}

    def watch(
        self, prompts: list[list[int]], tokens: int, extra: list[Any], watched: list[int]
    ) -> dict[str, Any]:
        """Decode rate and mean depth of each of the `watched` requests while all of them run.

        The window opens when all first tokens are out, and closes when a watched request has
        `tokens` tokens; the others run on for as long as it lasts. Also the share of the time that
        went into products with the vocabulary; our engine only.
        """
        progress: dict[str, int] = {}
        depths: dict[str, list[int]] = {}
        names = [self._add(p, END, e) for p, e in zip(prompts, extra, strict=True)]
        while len(progress) < len(names):
            self._step(progress, depths)
        chosen = [names[index] for index in watched]
        with PassProfile(self.llm) as profile:
            profile.start()
            started, before = time.perf_counter(), dict(progress)
            while all(progress[name] < tokens for name in chosen):
                self._step(progress, depths)
            seconds = time.perf_counter() - started
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        gained = [progress[name] - before[name] for name in chosen]
        means = [
            sum(depths[name][before[name] :]) / max(1, len(depths[name]) - before[name])
            for name in chosen
        ]
        return {
            "rates": [count / seconds for count in gained],
            "mean_depths": means,
            "read_out_share": profile.seconds["lm_head"] / seconds,
        }

    def profile(self, prompts: list[list[int]], tokens: int, extra: list[Any]) -> dict[str, Any]:
        """Where the time of a decode run goes, per pass; our engine only."""
        with PassProfile(self.llm) as profile:
            progress: dict[str, int] = {}
            names = [self._add(p, tokens, e) for p, e in zip(prompts, extra, strict=True)]
            while len(progress) < len(names):
                self._step(progress)
            profile.start()
            while self.engine.has_unfinished_requests():
                profile.step(lambda: self._step(progress))
            return profile.report()

    def read_out(self, rows: list[int], repeats: int = 9) -> dict[str, Any]:
        """Median seconds of the product of so many states with the vocabulary; our engine only."""
        import torch

        model = PassProfile(self.llm).runner.model
        medians = []
        for count in rows:
            seconds = []
            for _ in range(repeats):
                hidden = torch.randn(
                    count, model.config.hidden_size, dtype=model.lm_head.weight.dtype
                )
                began = time.perf_counter()
                model.compute_logits(hidden)
                seconds.append(time.perf_counter() - began)
            medians.append(sorted(seconds)[repeats // 2])
        return {"seconds": medians}

    def describe(self) -> dict[str, Any]:
        """Versions and threads of this process."""
        import torch
        import vllm

        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cores": sorted(os.sched_getaffinity(0)),
        }


COMMANDS = ("generate", "decode", "fill", "watch", "profile", "read_out", "describe")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=("ours", "baseline"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096)
    parser.add_argument("--pages", type=int, help="pages of the K/V pool")
    options = parser.parse_args()
    # Replies own stdout; whatever else is printed goes to stderr.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(options)
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        assert command in COMMANDS, command
        print(json.dumps(getattr(worker, command)(**request)), file=replies, flush=True)


if __name__ == "__main__":
    main()
