"""A process of its own: the bench is set up before anything imports vLLM (`bench.py` says why)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ALONE = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="every case on the CUDA bench: minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: runs with --long only")
    # A GPU computes masked elements too, and says nothing.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    paths = [Path(str(arg).split("::")[0]).resolve() for arg in config.args]
    config.stash[ALONE] = all(HERE in (path, *path.parents) for path in paths)
    if config.stash[ALONE]:
        from tests.cuda import bench

        bench.set_up()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Beside other folders' tests vLLM is what they need it to be.
    return None if config.stash[ALONE] else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long", default=False):
        return
    long = [item for item in items if "long" in item.keywords]
    items[:] = [item for item in items if "long" not in item.keywords]
    config.hook.pytest_deselected(items=long)


@pytest.fixture(scope="session")
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The engine that `bench.on` names. One lives at a time: vLLM's process groups are global, and
    pytest runs the tests of one engine together."""
    from tests.cuda import bench

    model, options = bench.ENGINES[request.param]
    if options.get("reasoning_parser"):
        from tests.engine.checkpoints import with_byte_tokenizer

        folder = tmp_path_factory.mktemp("cuda") / "model"
        model = with_byte_tokenizer(model, folder, reasoning=True)
    with bench.engine(model, **options) as llm:
        yield llm
