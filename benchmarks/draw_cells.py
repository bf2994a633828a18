"""Draws docs/cells.svg: the cells of two requests over the passes of a few steps, as they ran.

    python -m benchmarks.draw_cells [--model FOLDER] [--out docs/cells.svg]

Each request is served by the real engine; what a pass ran is recorded as it runs.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

QUESTIONS = (("What is 4821 + 3397?", 0.5), ("What is 4821 + 3397?", 1.0))
"""Two requests of one batch: (question, exit threshold)."""

COLOURS = ("#b7e4c7", "#74c69d", "#2d8f64", "#14532d", "#0b3d2e", "#072a20", "#041912", "#000000")


@dataclass
class Recording:
    """Cells as they ran: (pass, request id, position, loop), and the pass each step began at."""

    cells: list[tuple[int, str, int, int]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    passes: int = 0

    def watch(self, runner: Any) -> None:
        """Record every pass of a model runner from now on."""
        run_pass, model_forward = runner.run_pass, runner._model_forward

        def recording(hidden: Any, rows: Any) -> Any:
            for req, pos, loop in zip(rows.req, rows.pos, rows.loop, strict=True):
                name = runner.input_batch.req_ids[req]
                self.cells.append((self.passes, name, int(pos), int(loop)))
            self.passes += 1
            return run_pass(hidden, rows)

        def stepping(*args: Any, **kwargs: Any) -> Any:
            self.steps.append(self.passes)
            return model_forward(*args, **kwargs)

        runner.run_pass, runner._model_forward = recording, stepping


def record(model: str, tokens: int) -> tuple[Recording, list[Any], int]:
    """Serve `QUESTIONS` in one batch; returns the recording, the answers, and T."""
    from vllm import LLM, SamplingParams

    from ouro_runtime.plugin import register

    register()
    llm = LLM(model=model, enforce_eager=True, max_model_len=512, max_num_seqs=4)
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    recording = Recording()
    recording.watch(runner)
    outputs = llm.chat(
        [[{"role": "user", "content": question}] for question, _ in QUESTIONS],
        [
            SamplingParams(temperature=0, max_tokens=tokens, extra_args={"exit_threshold": q})
            for _, q in QUESTIONS
        ],
        use_tqdm=False,
    )
    return recording, outputs, runner.loop_config.loops


def draw(recording: Recording, outputs: list[Any], loops: int, passes: int) -> str:
    """SVG text: one panel per request, passes across, positions down, colour by loop."""
    size, left, top = 22, 150, 46
    lines: list[str] = []
    y = top
    names = list(dict.fromkeys(cell[1] for cell in recording.cells))
    for request, output in enumerate(outputs):
        prompt = len(output.prompt_token_ids)
        answer = output.outputs[0]
        shown = range(prompt - 1, prompt + len(answer.token_ids) - 1)
        title = f"request {request + 1}: threshold {QUESTIONS[request][1]:g}, depths "
        lines.append(text(10, y - 8, title + " ".join(map(str, answer.depths)), bold=True))
        for row, position in enumerate(shown):
            name = "last prompt token" if row == 0 else repr(piece(output, row - 1))
            lines.append(text(left - 8, y + row * size + 15, name, anchor="end"))
            for number, req, pos, loop in recording.cells:
                if req == names[request] and pos == position and number < passes:
                    x = left + number * size
                    lines.append(
                        f'<rect x="{x}" y="{y + row * size}" width="{size - 2}" '
                        f'height="{size - 2}" rx="3" fill="{COLOURS[loop]}"/>'
                    )
                    ink = "#fff" if loop > 1 else "#123"
                    lines.append(text(x + 10, y + row * size + 15, str(loop + 1), "middle", ink))
        y += len(shown) * size + 40
    bottom = y - 30
    for step, start in enumerate(recording.steps):
        if start < passes:
            x = left + start * size - 1
            lines.append(f'<path d="M{x} 18V{bottom}" stroke="#888" stroke-dasharray="3 3"/>')
            lines.append(text(x + 3, 16, f"step {step + 1}", ink="#666"))
    width = left + passes * size + 20
    caption = f"numbers are loops (T = {loops}); a column is one pass over all its cells"
    lines.append(text(left, bottom + 18, caption, ink="#666"))
    body = "\n".join(lines)
    width = max(width, left + 420)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 30}" '
        f'width="{width}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


def piece(output: Any, index: int) -> str:
    """The text of one generated token, as the tokenizer splits it."""
    return output.pieces[index]


def text(
    x: float, y: float, words: str, anchor: str = "start", ink: str = "#222", bold: bool = False
) -> str:
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{ink}"{weight}>{escaped}</text>'


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(root / "ouro_runtime/checkpoints/ouro-mini"))
    parser.add_argument("--out", type=Path, default=root / "docs" / "cells.svg")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--passes", type=int, default=24, help="passes to draw")
    args = parser.parse_args()
    recording, outputs, loops = record(args.model, args.tokens)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for output in outputs:
        output.pieces = [tokenizer.decode([t]) for t in output.outputs[0].token_ids]
    passes = min(args.passes, recording.passes)
    args.out.write_text(draw(recording, outputs, loops, passes))
    print(f"{args.out}: {passes} of {recording.passes} passes, {len(recording.steps)} steps")


if __name__ == "__main__":
    main()
