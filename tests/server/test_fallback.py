"""Requests that came in past our routes run at the defaults in force all the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ouro_server.fallback import complete_requests
from ouro_server.vllm_api import SamplingParams
from tests.server.fakes import serve


def test_only_what_a_request_lacks_is_filled_in() -> None:
    taken: list[Any] = []
    engine = SimpleNamespace(generate=lambda *args, **kwargs: taken.append((args, kwargs)))
    served = serve()
    complete_requests(engine, served)
    served.defaults.change({"exit_threshold": 0.4, "exit_mode": "exact"})
    served.defaults.steer({"standard": 0.6})

    bare = SamplingParams(extra_args={"other": 1})
    engine.generate("prompt", bare, "id", priority=2)
    assert taken == [(("prompt", bare, "id"), {"priority": 2})]
    assert bare.extra_args == {
        "other": 1,
        "exit_threshold": 0.6,
        "min_loops": 1,
        "max_loops": 4,
        "exit_mode": "exact",
        "exit_rule": "gate",
    }

    own = {"exit_threshold": 0.1, "min_loops": 2, "max_loops": 3, "exit_mode": "skip"}
    own["exit_rule"] = "margin"
    complete = SamplingParams(extra_args=dict(own))
    engine.generate("prompt", sampling_params=complete)
    assert complete.extra_args == own

    partial = SamplingParams(extra_args={"max_loops": 2})
    engine.generate("prompt", partial)
    assert partial.extra_args["max_loops"] == 2
    assert partial.extra_args["exit_mode"] == "exact"
