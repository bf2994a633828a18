"""A headless Chromium, driven over WebDriver."""

from __future__ import annotations

import base64
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.server.live import free_port

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
    "--no-proxy-server",
)
START_SECONDS = 30
WAIT_SECONDS = 20
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key under which WebDriver names an element in JSON."""

TAB, ENTER, ESCAPE, RIGHT = "\ue004", "\ue007", "\ue00c", "\ue014"


class Browser:
    """One window. Elements are named by CSS selectors; the first match counts."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._http.request(method, path, json=body)
        value = answer.json()["value"]
        assert answer.is_success, f"{path}: {value}"
        return value

    def open(self, url: str) -> None:
        """Load a page; returns when it has loaded."""
        self._call("POST", "url", {"url": url})

    def script(self, body: str, *args: Any) -> Any:
        """Run the body of a function in the page; a promise is awaited."""
        return self._call("POST", "execute/sync", {"script": body, "args": args})

    def text(self, css: str) -> str:
        """The text that is shown of an element; empty if there is none."""
        # Of what is not shown, innerText would be the text that is hidden.
        find = "const found = document.querySelector(arguments[0]);"
        return self.script(f"{find} return found?.checkVisibility() ? found.innerText : ''", css)

    def click(self, css: str) -> None:
        """Click where a user would."""
        self._call("POST", f"element/{self._find(css)[ELEMENT]}/click", {})

    def hover(self, css: str) -> None:
        """Move the pointer over an element."""
        move = {"type": "pointerMove", "origin": self._find(css), "x": 0, "y": 0, "duration": 0}
        self._act("pointer", [move])

    def press(self, keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        strokes = [{"type": f"key{way}", "value": key} for key in keys for way in ("Down", "Up")]
        self._act("key", strokes)

    def until(self, what: str, css: str, fits: Callable[[str], object]) -> str:
        """Wait until an element's text fits; returns it."""
        self.wait(f"{what}: {css}", lambda: fits(self.text(css)))
        return self.text(css)

    def wait(self, what: str, done: Callable[[], object]) -> None:
        """Wait until something is true of the page."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not done():
            assert time.monotonic() < deadline, f"{what}: not after {WAIT_SECONDS} s"
            time.sleep(0.05)

    def errors(self) -> list[str]:
        """What the console has complained about since it was asked last."""
        entries = self._call("POST", "se/log", {"type": "browser"})
        return [e["message"] for e in entries if e["level"] in ("WARNING", "SEVERE")]

    def devtools(self, command: str, **params: Any) -> Any:
        """A command of Chromium's DevTools protocol."""
        return self._call("POST", "goog/cdp/execute", {"cmd": command, "params": params})

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Give the page another size, in CSS pixels, and as many device pixels for each."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)

    def offline(self, on: bool) -> None:
        """Cut the page off from every server, or no longer."""
        rate = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.devtools("Network.enable")
        self.devtools("Network.emulateNetworkConditions", offline=on, **rate)

    def picture(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self._call("GET", "screenshot"))

    def _find(self, css: str) -> dict[str, str]:
        return self._call("POST", "element", {"using": "css selector", "value": css})

    def _act(self, kind: str, actions: list[dict[str, Any]]) -> None:
        self._call("POST", "actions", {"actions": [{"type": kind, "id": kind, "actions": actions}]})


@contextmanager
def browse() -> Iterator[Browser]:
    """A browser with an empty profile, until the block ends."""
    assert CHROMIUM and DRIVER, "needs chromium and chromedriver (Debian: chromium-driver)"
    port = free_port()
    url = httpx.URL(f"http://127.0.0.1:{port}")
    driver = subprocess.Popen([DRIVER, f"--port={port}", "--log-level=OFF"])
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
    ):
        wanted = {
            "browserName": "chrome",
            "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {
                "binary": CHROMIUM,
                "args": [*FLAGS, f"--user-data-dir={profile}"],
            },
        }
        session = None
        try:
            _wait_for(http)
            answer = http.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
            assert answer.is_success, answer.text
            session = url.join(f"/session/{answer.json()['value']['sessionId']}")
            http.base_url = session
            yield Browser(http)
        finally:
            # Without it chromium outlives its driver.
            if session is not None:
                assert http.delete(session).is_success
            driver.terminate()
            driver.wait(10)


def _wait_for(http: httpx.Client) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if http.get("/status").json()["value"]["ready"]:
                return
        except httpx.TransportError:
            assert time.monotonic() < deadline, "chromedriver did not start"
        time.sleep(0.1)
