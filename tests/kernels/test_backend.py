import subprocess
import sys
from pathlib import Path

import ouro_kernels

PROGRAM = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import ouro_kernels
x, weight = torch.ones(2, 8), torch.ones(8)
assert torch.allclose(ouro_kernels.rms_norm(x, weight, 1e-6), x)
"""


def test_without_triton_the_reference_serves_cpu_tensors():
    path = str(Path(ouro_kernels.__file__).parents[1])
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
