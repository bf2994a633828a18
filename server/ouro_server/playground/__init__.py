"""`/playground`: a page that asks the served model and shows the depth of every token.

Only the page and its assets are served here. What it shows comes from the server's own `/v1` API,
asked by the browser with the visitor's API key, so the page itself needs none.
"""

from collections.abc import Mapping
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).with_name("static")
PATH = "/playground"

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
"""Nothing inline, nothing from elsewhere, and never last version's assets with this one's page."""


class Assets(StaticFiles):
    """The page's assets, each with `HEADERS`."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def attach_playground(app: FastAPI) -> None:
    """Serve the page at `/playground` and its assets below it."""

    @app.get(PATH, include_in_schema=False)
    async def playground() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=dict(HEADERS))

    app.mount(PATH, Assets(directory=STATIC), name="playground")
