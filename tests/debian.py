"""Programs of Debian packages that tests drive (`scripts/ci_packages.sh` installs them)."""

from __future__ import annotations

import os
import shutil

import pytest


def need(program: str) -> str:
    """Where the program is. Without it the test is skipped, and fails where CI runs it."""
    found = shutil.which(program)
    if found:
        return found
    reason = f"{program} is not installed; as root: scripts/ci_packages.sh"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
