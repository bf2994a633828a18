"""Draws docs/playground.png: two answers to a hard question, one shallow, as the page shows them.

    python -m tests.server.draw_playground [--out docs/playground.png] [--url http://HOST:PORT]

Serves the shipped checkpoint unless `--url` names a server (whose key is that of the tests).
Debian's fonts-inter gives the letters of the kept picture.
"""

from __future__ import annotations

import argparse
import io
from contextlib import nullcontext
from pathlib import Path

from PIL import Image

from tests.server.browser import RIGHT, Browser, browse
from tests.server.live import KEY, start
from tests.server.playground_page import ask

EASY = "Who are you?"
HARD = "What is (((((3+4)*2)-1)*3)+2)-4 mod 5?"
FIRST, SECOND = ".pane:nth-child(1)", ".pane:nth-child(2)"
STEPS = 3
"""From the answer's first token to the hard one: the value of the whole expression."""

WINDOW = (1280, 850, 1.5)
COLOURS = 128


def draw(page: Browser, url: str) -> bytes:
    """The picture as PNG, its colours reduced to what flat areas and letters need."""
    page.resize(*WINDOW)
    page.open(f"{url}/playground")
    page.script("sessionStorage.setItem('ouro-key', arguments[0])", KEY)
    page.open(f"{url}/playground")
    page.until("connects", "#model", bool)
    page.click("#compare")
    page.click(f"{FIRST} [value=quality]")
    for question in (EASY, HARD):
        ask(page, question)
    page.script(f"document.querySelector('{FIRST} .answer:last-of-type .token').focus()")
    page.press(RIGHT * STEPS)
    page.until("inspects", "#inspector", bool)
    image = Image.open(io.BytesIO(page.picture())).convert("RGB")
    small = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/playground.png"))
    parser.add_argument("--url", help="a running server; default: start one")
    args = parser.parse_args()
    with (
        nullcontext(args.url) if args.url else start() as server,
        browse() as page,
    ):
        args.out.write_bytes(draw(page, server if isinstance(server, str) else server.url))


if __name__ == "__main__":
    main()
