"""Every kernel against its memory floor: `python -m benchmarks.kernels` on a GPU.

Each row is timed only after its result agreed with the reference on the same inputs, and vLLM's
kernels for the same work, where it has any, only after theirs agreed. The floor is the bytes a call
must move over the bandwidth of a large copy measured here. Calls are captured in a CUDA graph, as
an engine's are, so that nothing of the host is in their times; caches are cold (flushed before).
Writes `benchmarks/results/kernels-<gpu>.json`. With `--seconds` nothing is begun after so many, and
what was left out is named. Without a GPU, `--check` runs the agreement part at a small size in
Triton's interpreter.
"""

import argparse
import importlib
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "kernels") not in sys.path:
    sys.path.insert(0, str(ROOT / "kernels"))

from ouro_kernels.cases import Case, Shape, cases  # noqa: E402
from ouro_kernels.standin_fill import CacheTable  # noqa: E402

FLUSH_BYTES = 512 << 20
REPEATS = 60
# What a call changes and the next call would not survive or not do again.
STATE = ("residual", "survival", "depth", "loop", "positions", "active", "hidden", "qkv")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FP8_TOLERANCE = 0.05
"""Of the norm of the difference over the norm of the reference, by dtype."""


class DisagreementError(RuntimeError):
    """A kernel's result is not the reference's."""


def _compare(name: str, actual: Any, expected: Any) -> None:
    if isinstance(actual, CacheTable):
        for kind in ("k_caches", "v_caches"):
            _compare(kind, tuple(getattr(actual, kind)), tuple(getattr(expected, kind)))
    elif isinstance(actual, tuple):
        for left, right in zip(actual, expected, strict=True):
            _compare(name, left, right)
    elif isinstance(actual, torch.Tensor):
        if not actual.is_floating_point():
            if not torch.equal(actual, expected):
                raise DisagreementError(f"{name}: {int((actual != expected).sum())} values differ")
            return
        left, right = actual.float(), expected.float()
        error = float((left - right).norm() / right.norm().clamp(min=1e-30))
        if not error <= TOLERANCE.get(actual.dtype, FP8_TOLERANCE):
            raise DisagreementError(f"{name}: relative error {error:.2e}")


def _made(case: Case, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    return case.make(device)


def _reference(case: Case, device: torch.device) -> tuple[dict[str, Any], Any]:
    kwargs = _made(case, device)
    module = importlib.import_module(f"ouro_kernels.{case.op}.reference")
    return kwargs, getattr(module, case.function)(**kwargs)


def _ours(case: Case) -> Callable[..., Any]:
    return getattr(importlib.import_module("ouro_kernels"), case.function)


def verify(case: Case, device: torch.device) -> tuple[dict[str, Any], Any]:
    """The reference's arguments and result; DisagreementError unless ours equal both."""
    kwargs = _made(case, device)
    result = _ours(case)(**kwargs)
    expected_kwargs, expected = _reference(case, device)
    _compare("result", result, expected)
    for name, value in kwargs.items():
        _compare(name, value, expected_kwargs[name])
    return expected_kwargs, expected


def rival(case: Case, kwargs: dict[str, Any]) -> Callable[[], torch.Tensor] | None:
    """The same work done with vLLM's kernels, or None where vLLM has none or is not installed."""
    try:
        from vllm import _custom_ops as ops
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    if case.op == "read_out" and not case.variant:
        return lambda: torch.nn.functional.linear(kwargs["hidden"], kwargs["weight"])
    if case.op == "sandwich_norm":
        x, eps = kwargs["x"], kwargs["eps"]
        first = kwargs.get("post_weight", kwargs.get("weight"))
        second = kwargs.get("final_weight", kwargs.get("pre_weight"))
        middle, out = torch.empty_like(x), torch.empty_like(x)

        def norm() -> torch.Tensor:
            ops.rms_norm(middle, x, first, eps)
            if second is not None:
                ops.fused_add_rms_norm(middle, kwargs["residual"], second, eps)
            if case.variant != "pre":
                return middle
            ops.rms_norm(out, middle, kwargs["pre_weight"], eps)
            return out

        return norm
    if case.op == "rope_kv_write" and "fill" not in case.variant:
        qkv, shape = kwargs["qkv"], case.shape
        sizes = [heads * shape.head_dim for heads in (shape.q_heads, *[shape.kv_heads] * 2)]
        q, k, v = qkv.split(sizes, dim=1)
        k_heads, v_heads = (part.unflatten(1, (-1, shape.head_dim)) for part in (k, v))
        one = torch.ones(1, device=qkv.device)
        scales = (kwargs.get("k_scale", one), kwargs.get("v_scale", one))
        kind = "fp8" if "k_scale" in kwargs else "auto"
        caches = [kwargs[name] for name in ("k_cache", "v_cache")]
        if kind == "fp8":
            caches = [cache.view(torch.uint8) for cache in caches]

        def write() -> torch.Tensor:
            ops.rotary_embedding(kwargs["positions"], q, k, shape.head_dim, kwargs["cos_sin"], True)
            slots = kwargs["slot_mapping"]
            ops.reshape_and_cache_flash(k_heads, v_heads, *caches, slots, kind, *scales)
            return q.unflatten(1, (-1, shape.head_dim))

        return write
    if case.op == "loop_decode_attention" and "k_scale" not in kwargs:
        rows = case.shape.rows
        everyone = torch.arange(rows, device=kwargs["q"].device)
        table = kwargs["block_table"][kwargs["loop"].long(), everyone]
        starts = torch.arange(rows + 1, device=table.device, dtype=torch.int32)

        def attend() -> torch.Tensor:
            return flash_attn_varlen_func(
                kwargs["q"],
                kwargs["k_cache"],
                kwargs["v_cache"],
                max_seqlen_q=1,
                cu_seqlens_q=starts,
                max_seqlen_k=case.shape.context,
                seqused_k=kwargs["seq_lens"],
                softmax_scale=kwargs["scale"],
                causal=True,
                block_table=table,
                fa_version=3,
            )

        return attend
    return None


def _quantiles(call: Callable[[], Any], kwargs: dict[str, Any]) -> list[float]:
    """p20, p50 and p80 of one call's time on the device, in microseconds."""
    saved = {name: kwargs[name].clone() for name in STATE if name in kwargs}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    call()  # compiled outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    pairs = []
    for _ in range(REPEATS):
        for name, value in saved.items():
            kwargs[name].copy_(value)
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    for name, value in saved.items():
        kwargs[name].copy_(value)
    times = torch.tensor([start.elapsed_time(end) * 1e3 for start, end in pairs[10:]])
    return [round(float(times.quantile(q)), 2) for q in (0.2, 0.5, 0.8)]


def copy_bandwidth() -> float:
    """Bytes per second of a 4 GiB device-to-device copy, read and write counted."""
    source = torch.ones(2 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    p50 = _quantiles(lambda: target.copy_(source), {})[1]
    return 2 * source.numel() / (p50 * 1e-6)


def measured(case: Case, bandwidth: float) -> dict[str, Any]:
    device = torch.device("cuda")
    row: dict[str, Any] = {
        "kernel": f"{case.function} {case.variant}".strip(),
        "rows": case.shape.rows,
        "context": case.shape.context,
        "bytes": case.bytes,
        "floor_us": round(case.bytes / bandwidth * 1e6, 2),
    }
    expected_kwargs, expected = verify(case, device)
    kwargs = _made(case, device)
    function = _ours(case)
    row["us"] = _quantiles(lambda: function(**kwargs), kwargs)
    row["over_floor"] = round(row["us"][1] / max(row["floor_us"], 1e-9), 2)
    kwargs = _made(case, device)
    other = rival(case, kwargs)
    if other is None:
        return row
    try:
        answer = expected if expected is not None else expected_kwargs["residual"]
        _compare("vLLM's result", other(), answer)
        kwargs = _made(case, device)
        other = rival(case, kwargs)
        assert other is not None
        row["vllm_us"] = _quantiles(other, kwargs)
    except (DisagreementError, RuntimeError, NotImplementedError) as error:
        row["vllm_error"] = str(error).splitlines()[0]
    return row


def benchmark_cases() -> Iterator[Case]:
    """Ouro-1.4B at the batch sizes and contexts of the engine's benchmark."""
    for rows in (1, 8, 32, 128):
        for context in (128, 1024):
            shape = Shape(rows=rows, context=context)
            for case in cases(shape):
                if case.op == "standin_fill":
                    continue
                if case.op == "loop_decode_attention" or context == 128:
                    yield case
        # One block a row: what the fill moves does not depend on the context.
        short = Shape(rows=rows, context=16)
        yield from (case for case in cases(short) if case.op == "standin_fill")


def _report(rows: list[dict[str, Any]], left_out: list[str], bandwidth: float) -> Path:
    import triton

    gpu = torch.cuda.get_device_name()
    try:
        from vllm import __version__ as vllm_version
    except ImportError:
        vllm_version = None
    report = {
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": vllm_version,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "quantiles": ["p20", "p50", "p80"],
        "rows": rows,
        "left_out": left_out,
    }
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = ROOT / "benchmarks" / "results" / f"kernels-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def check_without_gpu() -> int:
    """The agreement part, small, in the interpreter. Status 1 if a kernel disagrees."""
    os.environ["TRITON_INTERPRET"] = "1"
    from ouro_kernels import _interpreter

    _interpreter.install()
    shape = Shape(rows=3, context=19, hidden=64, q_heads=4, kv_heads=4, head_dim=32, layers=2)
    failed = 0
    for case in cases(replace(shape, vocab=32)):
        name = f"{case.function} {case.variant}".strip()
        try:
            verify(case, torch.device("cpu"))
            print(f"{name:<36} agrees with the reference")
        except DisagreementError as error:
            failed += 1
            print(f"{name:<36} DISAGREES: {error}")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the reference only")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin nothing after this long"
    )
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    if not torch.cuda.is_available():
        if options.check:
            return check_without_gpu()
        print("No CUDA device: kernel times need one (--check compares results without it).")
        return 1
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e9:.0f} GB/s")
    print(f"{'kernel':<28} rows  ctx  floor us    p20    p50    p80  over floor   vLLM p50")
    rows, left_out, failed = [], [], 0
    for case in benchmark_cases():
        if options.only not in case.function:
            continue
        name = f"{case.function} {case.variant}".strip()
        if time.monotonic() > deadline:
            left_out.append(f"{name}, {case.shape.rows} rows, context {case.shape.context}")
            continue
        try:
            if options.check:
                verify(case, torch.device("cuda"))
                continue
            row = measured(case, bandwidth)
        except DisagreementError as error:
            failed += 1
            print(f"{name:<28} DISAGREES: {error}")
            continue
        rows.append(row)
        p20, p50, p80 = row["us"]
        other = row.get("vllm_us", ["", row.get("vllm_error", "-")])[1]
        print(
            f"{name:<28} {row['rows']:>4} {row['context']:>4} {row['floor_us']:>9} {p20:>6}"
            f" {p50:>6} {p80:>6} {row['over_floor']:>11}   {other}"
        )
    for what in left_out:
        print(f"out of time: {what}")
    if rows:
        print(f"written to {_report(rows, left_out, bandwidth).relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
