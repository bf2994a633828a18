"""One engine on a GPU, in a process of its own: JSON lines from `benchmarks.gpu`, and replies."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from typing import Any

from benchmarks.workload import depth_lists, prompts

TOKENS = 128
LONGEST = 1024 + TOKENS + 8
MOST = 128
"""Tokens generated per request, positions of a request and requests at once, at most."""

SHARE = 0.4
"""Of the GPU's memory, what the K/V pool of one engine takes."""

SIZES = (1, 8, 32, 128)
"""Batches that graphs are captured for; others run padded to the next."""

WINDOWS = 16
"""A run's decode steps are cut into so many windows; percentiles are over their rates."""


class Served:
    """An engine in this process, and what is measured on it."""

    def __init__(self, kind: str, folder: str) -> None:
        overrides, self.kind = None, kind
        if kind == "baseline":
            from benchmarks import baseline

            overrides = baseline.register()
        else:
            from ouro_runtime.plugin import register

            register()
        import torch
        from vllm import LLM

        golden = kind == "golden"
        memory = torch.cuda.get_device_properties(0).total_memory
        self.llm = LLM(
            model=folder,
            dtype="float32" if golden else "bfloat16",
            load_format="auto" if golden else "dummy",
            hf_overrides=overrides,
            skip_tokenizer_init=True,
            max_model_len=256 if golden else LONGEST,
            max_num_seqs=64 if golden else MOST,
            max_num_batched_tokens=2048 if golden else 8192,
            # Engines start beside each other, so none may measure what is free.
            gpu_memory_utilization=0.05,
            kv_cache_memory_bytes=1 << 30 if golden else int(SHARE * memory),
            compilation_config={"cudagraph_capture_sizes": list(SIZES)},
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=0,
        )
        self.engine = self.llm.llm_engine
        self.torch = torch
        self.count = 0

    def room(self) -> int:
        """Positions that the K/V pool holds, at every loop."""
        cache, model = self.engine.vllm_config.cache_config, self.engine.vllm_config.model_config
        # The baseline's blocks are of every loop, ours of one.
        loops = 1 if self.kind == "baseline" else model.hf_config.total_ut_steps
        return cache.num_gpu_blocks // loops * cache.block_size

    def describe(self) -> dict[str, Any]:
        import triton
        import vllm

        torch = self.torch
        data = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        copies = []
        for _ in range(6):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            data[: 1 << 29].copy_(data[1 << 29 :])
            ended.record()
            torch.cuda.synchronize()
            copies.append((1 << 30) / began.elapsed_time(ended) * 1e3)
        return {
            "gpu": torch.cuda.get_device_name(),
            "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
            "copy_bytes_per_second": max(copies),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        }

    def generate(self, cases: list[list[Any]]) -> list[Any]:
        """Tokens and depths of (prompt, tokens, depth fields) in one batch."""
        from vllm import SamplingParams

        answers = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _, _ in cases],
            [
                SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, extra_args=fields)
                for _, n, fields in cases
            ],
            use_tqdm=False,
        )
        outputs = [answer.outputs[0] for answer in answers]
        return [[list(out.token_ids), list(getattr(out, "depths", ()))] for out in outputs]

    def decode(self, batch: int, context: int, mean: float, forced: bool) -> dict[str, Any]:
        """Decode rates of a full batch, from when every request has its first token."""
        from vllm import SamplingParams

        if batch * (context + TOKENS) > self.room():
            return {"skipped": f"the K/V pool holds {self.room()} positions"}
        depths = depth_lists(mean, TOKENS, batch) if forced else [None] * batch
        vocab = self.engine.vllm_config.model_config.get_vocab_size()
        for ids, forced_depths in zip(prompts(batch, context, vocab), depths, strict=True):
            self.count += 1
            extra: dict[str, Any] = {"exit_mode": "skip"}
            if forced_depths is not None:
                extra["forced_depths"] = forced_depths
            params = SamplingParams(
                temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False
            )
            params.extra_args = extra
            self.engine.add_request(str(self.count), {"prompt_token_ids": ids}, params)
        progress: dict[str, int] = {}
        marks: list[tuple[float, int]] = []
        while self.engine.has_unfinished_requests():
            ended = 0
            for answer in self.engine.step():
                progress[answer.request_id] = len(answer.outputs[0].token_ids)
                ended += answer.finished
            if len(progress) == batch:
                marks.append((time.perf_counter(), sum(progress.values())))
            if ended:
                break  # the batch is not full any more
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return rates(marks)


def rates(marks: list[tuple[float, int]]) -> dict[str, Any]:
    """Tokens/s over (time, tokens so far): overall, and percentiles over windows."""
    overall = (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])
    size = max(1, (len(marks) - 1) // WINDOWS)
    windows = [
        (b[1] - a[1]) / (b[0] - a[0])
        for a, b in zip(marks[::size], marks[size::size], strict=False)
        if b[0] > a[0]
    ]
    if len(windows) < 2:
        windows = [overall, overall]
    cuts = statistics.quantiles(windows, n=10, method="inclusive")
    return {"rate": overall, "p20": cuts[1], "p50": cuts[4], "p80": cuts[7], "steps": len(marks)}


def serve(kind: str, folder: str) -> None:
    """Answer requests on stdin; whatever else is printed goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    served = Served(kind, folder)
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        assert command in ("describe", "generate", "decode"), command
        print(json.dumps(getattr(served, command)(**request)), file=replies, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=("ours", "baseline", "golden"), required=True)
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    serve(options.engine, options.model)
