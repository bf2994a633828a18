"""Compile every kernel for sm_90 without a GPU and print registers, shared memory and spills.

    python -m ouro_kernels.aot [--quick] [--json FILE]

The launches are those the ops really make at the released models' shapes, so what is compiled here
is what runs there. Status 1 if a kernel does not compile or spills a register. TRITON_INTERPRET
must not be set: an interpreted kernel has nothing to compile.
"""

import argparse
import hashlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ouro_kernels import _backend
from ouro_kernels._launch import OPTIONS, Launch, recording
from ouro_kernels.cases import Case, Shape, cases

ARCH = 90
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Row:
    """What one compiled kernel takes. Shared memory in bytes, spills in bytes per thread."""

    kernel: str
    variant: str
    warps: int
    registers: int
    shared: int
    spill_stores: int
    spill_loads: int


def _argument(value: Any) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it may be taken as a multiple of 16.

    The same specialisation as a launch's, except that a pointer is always aligned: what the ops
    are given in an engine is.
    """
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def _source(launched: Launch):
    from triton.compiler import ASTSource

    names = launched.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate(zip(names, launched.args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name], aligned = _argument(value)
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    for name, value in launched.constants.items():
        signature[name], constants[(names.index(name),)] = "constexpr", value
    return ASTSource(launched.kernel, signature, constants, attributes)


def _ptxas(ptx: str) -> str:
    """The report of the assembler that Triton uses for this target; it needs no driver."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(ARCH).path, "-v", f"--gpu-name=sm_{ARCH}a", str(source)]
        command += ["-o", str(Path(folder) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_launch(launched: Launch, variant: str) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": launched.num_warps, "num_stages": launched.num_stages, **OPTIONS}
    target = GPUTarget("cuda", ARCH, 32)
    compiled = triton.compile(_source(launched), target=target, options=options)
    report = _ptxas(compiled.asm["ptx"])

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        if found is None:
            raise RuntimeError(f"no {pattern!r} in the assembler's report:\n{report}")
        return int(found[1])

    return Row(
        launched.kernel.fn.__name__.strip("_").removesuffix("_kernel"),
        variant,
        launched.num_warps,
        number(r"Used (\d+) registers"),
        compiled.metadata.shared,
        number(r"(\d+) bytes spill stores"),
        number(r"(\d+) bytes spill loads"),
    )


def _variants(quick: bool) -> list[tuple[str, Case]]:
    """The released model in bf16; unless quick, fp16, fp32 and odd sizes as well."""
    # Three blocks a row: a table width that the compiler may not take for a multiple of 16.
    base = Shape(rows=2, context=40, layers=2, vocab=64)
    named = [(case.variant, case) for case in cases(base)]
    if quick:
        return named
    for dtype in (torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for case in cases(replace(base, dtype=dtype, kv_dtype=dtype)):
            named.append((f"{case.variant} {name}".strip(), case))
    small = replace(base, hidden=1032, q_heads=12, kv_heads=3, head_dim=80)
    named += [(f"{case.variant} odd".strip(), case) for case in cases(small)]
    return named


def launches(quick: bool = False) -> list[tuple[str, Launch]]:
    """Every distinct launch of the ops, with the variant that makes it."""
    seen, found = set(), []
    for variant, case in _variants(quick):
        kwargs = case.make(torch.device("cpu"))
        if kwargs.get("num_splits", 1) is None:
            kwargs["num_splits"] = 4
        backend = importlib.import_module(f"ouro_kernels.{case.op}.triton")
        with recording() as recorded:
            getattr(backend, case.function)(**kwargs)
        for launched in recorded:
            source = _source(launched)
            facts = (launched.kernel.fn.__name__, source.signature, source.constants, source.attrs)
            key = hashlib.sha256(repr((facts, launched.num_warps)).encode()).hexdigest()
            if key not in seen:
                seen.add(key)
                found.append((variant, launched))
    return found


def table(rows: list[Row]) -> str:
    lines = [f"{'kernel':<16} {'variant':<22} warps  regs  shared  spills (store/load)"]
    lines += [
        f"{row.kernel:<16} {row.variant:<22} {row.warps:>5} {row.registers:>5} {row.shared:>7}"
        f"  {row.spill_stores}/{row.spill_loads}"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the released model in bf16 only")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    if _backend.interpreting():
        print("TRITON_INTERPRET is set: unset it to compile kernels", file=sys.stderr)
        return 2
    import triton

    rows, failures = [], []
    for variant, launched in launches(options.quick):
        try:
            rows.append(compile_launch(launched, variant))
        except Exception as error:
            failures.append(f"{launched.kernel.fn.__name__} ({variant}): {error}")
    print(f"triton {triton.__version__}, sm_{ARCH}, {len(rows)} kernels")
    print(table(rows))
    if options.json:
        report = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    failures += [f"{row.kernel} ({row.variant}): spills" for row in rows if row.spill_stores]
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
