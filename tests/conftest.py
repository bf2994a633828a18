"""What every test process needs before vLLM is imported."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""In-process engines, so that tests are quick and can look inside; no network, no usage report."""

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

THIRD_PARTY_WARNINGS = (
    "ignore:.*torch.jit.*:DeprecationWarning",
    "ignore:.*torch.distributed.reduce_op.*:FutureWarning",
    "ignore:max_rollback_tokens is deprecated:DeprecationWarning",
    "ignore:builtin type .* has no __module__ attribute:DeprecationWarning",
)
"""What importing and starting vLLM says; everything else is an error."""


def pytest_configure(config: pytest.Config) -> None:
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
