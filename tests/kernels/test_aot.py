import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import ouro_kernels
from ouro_kernels._launch import recording
from ouro_kernels.aot import Row
from ouro_kernels.sandwich_norm import triton as sandwich

KERNELS = {
    "rms_norm",
    "sandwich",
    "loop",
    "exit_gate",
    "rope_kv_write",
    "attend_mha",
    "attend_gqa",
    "combine",
    "standin_fill",
    "next_pass",
    "read_out",
}


def test_every_kernel_compiles_for_hopper_without_spills(tmp_path, capsys):
    """In a process without the interpreter and with no compiled kernels to reuse.

    The table is shown also when the test passes: it is what a reader of the log looks for.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # What is on the path already may choose the triton.
    paths = [str(Path(ouro_kernels.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "ouro_kernels.aot", "--quick", "--json", str(report)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout}")
    rows = [Row(**row) for row in json.loads(report.read_text())["rows"]]
    assert {row.kernel for row in rows} == KERNELS
    for row in rows:
        assert row.registers > 0
        assert row.spill_stores == row.spill_loads == 0
        assert row.kernel in done.stdout


def test_recording_runs_nothing_and_ends(device):
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    with recording() as recorded:
        out = sandwich.rms_norm(x, weight, 1e-6)
    assert len(recorded) == 1
    assert out.isnan().all()
    assert not sandwich.rms_norm(x, weight, 1e-6).isnan().any()
