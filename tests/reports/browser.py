"""A headless Chromium, driven by its DevTools protocol over a pipe: no package is needed for that."""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import shutil
import signal
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
LIMIT_SECONDS = 120  # a shared machine may be slow


def chromium() -> str | None:
    """The path of an installed Chromium; None without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in a browser of its own."""

    def __init__(self, program: str, profile: Path):
        """Args:
        program: of Chromium.
        profile: a directory for what it keeps.
        """
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        (from_us, self._to), (self._from, to_us) = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4. Copies above them cannot be in their way.
        copies = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in (from_us, to_us)]
        actions = [(os.POSIX_SPAWN_DUP2, copy, place) for copy, place in zip(copies, (3, 4), strict=True)]
        actions += [(os.POSIX_SPAWN_OPEN, place, os.devnull, os.O_RDWR, 0) for place in (0, 1, 2)]
        command = [program, *flags, "--remote-debugging-pipe"]
        self._process = os.posix_spawn(program, command, os.environ, file_actions=actions)
        for each in (from_us, to_us, *copies):
            os.close(each)
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._from, selectors.EVENT_READ)
        self._buffer, self._number, self._session = b"", 0, None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url: str, width: int = 1200, scheme: str = "light") -> list[dict[str, Any]]:
        """Loads a page.

        Args:
            url: of it.
            width: of the window.
            scheme: that the reader prefers, `light` or `dark`.

        Returns:
            What happened meanwhile: requests, complaints of the console, dialogs.
        """
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])
        # A change of what follows the # alone would load nothing.
        self._call("Page.navigate", url="about:blank")
        events = list[dict[str, Any]]()
        self._call("Page.navigate", events, url=url)
        # A load event may be that of the blank page.
        while self.run("document.readyState + location.href", events) != f"complete{url}":
            time.sleep(0.05)
        return events

    def run(self, script: str, events: list[dict[str, Any]] | None = None) -> Any:
        """The value of an expression in the page; its policy does not hold for it.

        Args:
            script: the expression.
            events: what happens meanwhile is added to it.
        """
        answer = self._call("Runtime.evaluate", events, expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def close(self) -> None:
        """Ends the browser."""
        os.close(self._to)  # Chromium ends when nobody commands it any more
        deadline = time.monotonic() + LIMIT_SECONDS
        while os.waitpid(self._process, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(self._process, signal.SIGKILL)
            time.sleep(0.05)
        self._ready.close()
        os.close(self._from)

    def _call(self, method: str, events: list[dict[str, Any]] | None = None, **values: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": values}
        message |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            if events is not None and "method" in answer:
                events.append(answer)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert self._ready.select(max(deadline - time.monotonic(), 0)), "Chromium does not answer"
            data = os.read(self._from, 1 << 16)
            assert data, "Chromium ended"
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)
