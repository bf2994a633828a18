"""Makes Triton's interpreter compute what the hardware does. For tests and checks without a GPU.

What (Triton 3.6 to 3.9, triton/runtime/interpreter.py):
- `_convert_float` truncates float32 to bfloat16 and loses the carry when it rounds to
  float8_e4m3fn (1.97 becomes 1, not 2); the hardware rounds both to nearest, ties to even.
- `create_dot` multiplies the bit patterns of bfloat16 operands as integers.
- `_patch_lang_tensor` (3.6) takes the index of a one-element array, which NumPy 2.4 refuses.
When it can go: `tests/kernels/test_interpreter.py` fails when the first two mend themselves.
"""

import inspect

import torch
import triton.language as tl
from triton.runtime import interpreter

original_convert = interpreter._convert_float
original_dot = interpreter.InterpreterBuilder.create_dot
_original_patch = interpreter._patch_lang_tensor

_TARGETS = {
    tl.bfloat16: (torch.bfloat16, torch.int16, "uint16"),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, "uint8"),
}
_SIGNATURES = {
    original_convert: ["input", "input_dtype", "output_dtype", "rounding_mode"],
    original_dot: ["self", "a", "b", "d", "input_precision", "max_num_imprecise_acc"],
    _original_patch: ["tensor", "scope"],
}


def convert_float(values, input_dtype, output_dtype, rounding_mode):
    toward_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
    if input_dtype != tl.float32 or output_dtype not in _TARGETS or toward_zero:
        return original_convert(values, input_dtype, output_dtype, rounding_mode)
    dtype, bits, raw = _TARGETS[output_dtype]
    source = torch.from_numpy(values.reshape(-1).copy().view("float32"))
    return source.to(dtype).view(bits).numpy().view(raw).reshape(values.shape)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    a, b = (
        self.cast_impl(operand, tl.block_type(tl.float32, list(operand.data.shape)))
        if operand.dtype.scalar == tl.bfloat16
        else operand
        for operand in (a, b)
    )
    return original_dot(self, a, b, d, input_precision, max_num_imprecise_acc)


def _patch(tensor, scope):
    _original_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def install() -> None:
    """Correct this process's interpreter. Raises if Triton's functions are no longer these."""
    for function, expected in _SIGNATURES.items():
        names = list(inspect.signature(function).parameters)
        if names != expected:
            raise RuntimeError(f"{function.__qualname__} of this Triton takes {names}")
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter._patch_lang_tensor = _patch
