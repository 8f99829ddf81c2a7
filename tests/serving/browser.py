"""Headless Chromium for tests, driven over chromedriver's own protocol: https://www.w3.org/TR/webdriver2/."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

TAB, ESCAPE, RIGHT, CONTROL, ENTER = "\ue004", "\ue00c", "\ue014", "\ue009", "\ue007"
MISSING = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
_ARGUMENTS = ["--headless=new", "--no-first-run", "--hide-scrollbars", *(["--no-sandbox"] if os.getuid() == 0 else [])]


class Browser:
    """One window.

    Args:
        session: the address of a session of chromedriver.
    """

    def __init__(self, session: str) -> None:
        self._session = session

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """Send a command of the protocol and return its value."""
        answer = httpx.request(method, self._session + path, json=body if method == "POST" else None, timeout=60)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        """Load a page."""
        self.ask("POST", "/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns."""
        return self.ask("POST", "/execute/sync", script=script, args=list(arguments))

    def wait(self, condition: str, seconds: float = 20) -> Any:
        """Return the value of an expression as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(f"return {condition}")):
            assert time.monotonic() < deadline, (
                f"never true: {condition}\n{self.run('return document.body.innerText')[:2000]}"
            )
            time.sleep(0.05)
        return value

    def press(self, *keys: str) -> None:
        """Press keys one after the other, and hold all of them until the last is down."""
        actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp") for key in keys]
        self.ask("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def show_as(self, width: int, height: int, scheme: str) -> None:
        """Take a screen of this size in CSS pixels, and a colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", **metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._devtools("Emulation.setEmulatedMedia", features=features)

    def _devtools(self, command: str, **parameters: Any) -> Any:
        return self.ask("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def photograph(self, path: Path) -> None:
        """Write what is on the screen as PNG."""
        path.write_bytes(base64.b64decode(self.ask("GET", "/screenshot")))

    def complaints(self) -> list[str]:
        """Return the console's warnings and errors since the last call."""
        entries = self.ask("POST", "/se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]


@contextlib.contextmanager
def browse() -> Iterator[Browser]:
    """Start Chromium for a block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # for profiles, which Chromium leaves
        environment = os.environ | {"TMPDIR": folder}
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, env=environment)
        try:
            browser = Browser(_session(f"http://127.0.0.1:{port}"))
            try:
                yield browser
            finally:
                browser.ask("DELETE", "")  # the browser would outlive its driver
        finally:
            driver.terminate()
            driver.wait(timeout=30)


def _session(driver: str) -> str:
    options = {"args": _ARGUMENTS, "binary": shutil.which("chromium")}
    wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    body = {"capabilities": {"alwaysMatch": wanted}}
    transport = httpx.HTTPTransport(retries=10)  # until it listens
    with httpx.Client(transport=transport, timeout=60) as client:
        answer = client.post(f"{driver}/session", json=body)
    assert answer.status_code == 200, answer.text
    return f"{driver}/session/{answer.json()['value']['sessionId']}"
