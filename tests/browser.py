"""
A headless Chromium, spoken to through pipes: https://chromedevtools.github.io/devtools-protocol. Debian and Ubuntu have
it as the package `chromium`.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
PATIENCE = 30
Scheme = Literal["light", "dark"]


def found() -> str | None:
    """Where the browser is: $CHROMIUM, or whatever of its names is on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page, and what it complained of and asked for since it was opened."""

    def __init__(self, pipes: tuple[int, int]) -> None:
        self._to, self._from = pipes
        self._number, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers; events that come before are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps({**message, **session}).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path, width: int, scheme: Scheme = "light", anchor: str = "") -> None:
        """Load a page at a width and wait until it is there."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        # Between two places on one page nothing would be loaded.
        for address in ("about:blank", page.as_uri() + anchor):
            self.events.clear()
            self.call("Page.navigate", url=address)
            while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
                self.events.append(self._message())

    def run(self, script: str) -> Any:
        """The value of an expression on the page; an AssertionError where it throws."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, breaches of the policy among them."""
        said = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in said]

    def requests(self) -> list[str]:
        """Addresses that the page asked for, itself among them."""
        asked = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in asked]

    def picture(self, path: Path) -> None:
        """All of the page, as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 6000), "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], PATIENCE)
            read = os.read(self._from, 1 << 16) if ready else b""
            if not read:
                raise RuntimeError("the browser ended" if ready else f"no word from the browser for {PATIENCE} s")
            self._buffer += read
        one, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(one)
        return message


@contextmanager
def browser(executable: str, profile: Path) -> Iterator[Tab]:
    """A tab of a browser of its own, which reads commands from descriptor 3 and answers on 4."""
    commands, answers = os.pipe(), os.pipe()
    # Not sh: dash knows descriptors of one digit alone.
    wrapped = ["bash", "-c", f'exec "$@" 3<&{commands[0]} 4>&{answers[1]}', "bash"]
    process = subprocess.Popen(
        [*wrapped, executable, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(commands[0], answers[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands[0])
    os.close(answers[1])
    try:
        yield Tab((commands[1], answers[0]))
    finally:
        process.terminate()
        process.wait()
        os.close(commands[1])
        os.close(answers[0])
