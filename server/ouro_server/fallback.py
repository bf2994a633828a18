"""Requests whose endpoint knows no depth run at the defaults in force.

The engine keeps the defaults it was started with; the server's may have changed since.
"""

from collections.abc import AsyncGenerator
from typing import Any

from ouro_runtime.config import DEPTH_FIELDS, ExitParams
from ouro_server.served import ServedDepth


def complete_requests(engine_client: Any, served: ServedDepth) -> None:
    """Let an engine client put the controls that a request lacks into its `extra_args`."""
    generate = engine_client.generate

    def completing(
        prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        given = sampling_params.extra_args or {}
        if any(given.get(name) is None for name in DEPTH_FIELDS):
            defaults = served.defaults.for_class(served.book.default_class)
            others = {k: v for k, v in given.items() if k not in DEPTH_FIELDS}
            params = ExitParams.parse(given, defaults, served.loops).settled(served.loops)
            sampling_params.extra_args = {**others, **params.controls()}
        return generate(prompt, sampling_params, *args, **kwargs)

    engine_client.generate = completing
