"""The one real server that the end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.asking import EARLY, FULL
from tests.server.live import Live, start


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    with start() as server:
        yield server


@pytest.fixture(params=[FULL, EARLY], ids=["full", "early"])
def depth(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A request's depth controls: none, and an early threshold."""
    return request.param
