"""The line that says when and where the server serves."""

import asyncio
from argparse import Namespace

from starlette.datastructures import State

from ouro_runtime.config import GATE
from ouro_server.run_folder import now_serves

_POLL_SECONDS = 0.05


def address(args: Namespace) -> str:
    """Where clients reach the server, as a URL (or the path of a Unix socket)."""
    if args.uds:
        return f"unix:{args.uds}"
    host = args.host or "0.0.0.0"
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if args.ssl_keyfile else 'http'}://{host}:{args.port}"


def ready_line(state: State, args: Namespace) -> str:
    """The line itself."""
    served = state.depth
    defaults = served.defaults.base
    bounds = (
        ""
        if (defaults.min_loops, defaults.max_loops) == (1, served.loops)
        else f", loops {defaults.min_loops} to {defaults.max_loops}"
    )
    rule = "" if defaults.exit_rule == GATE else f" of {defaults.exit_rule}"
    presets = f"; presets {', '.join(served.book.presets)}" if served.book.presets else ""
    return (
        f"Ouro Serve is ready at {address(args)} (model {served.model}, T={served.loops}, "
        f"exit threshold {defaults.exit_threshold:g}{rule}{bounds}, mode {defaults.exit_mode}"
        f"{presets})"
    )


async def until_serving(state: State) -> None:
    """Return once the HTTP server accepts connections."""
    while not getattr(getattr(state, "server", None), "started", False):
        await asyncio.sleep(_POLL_SECONDS)


def announce(state: State, args: Namespace) -> None:
    """Print the line, and note that requests are taken."""
    now_serves()
    print(ready_line(state, args), flush=True)
