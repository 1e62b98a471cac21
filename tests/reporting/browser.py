"""A headless Chromium over the DevTools protocol's pipe (file descriptors 3 and 4, JSON texts ended by a null byte):
a real browser for tests, without a package.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT = 30.0  # seconds of silence on a busy machine
OPTIONS = (
    "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
# Run in between: puts the two ends of the pipes at 3 and 4, by way of higher numbers lest one falls on the other.
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One browser with one tab. events: what it reported since the last open(): {"method", "params"}."""

    def __init__(self, program: str, profile: Path) -> None:
        command = [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        if os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # Chromium refuses to start as root with its sandbox
        theirs_in, self._send_end = os.pipe()
        self._receive_end, theirs_out = os.pipe()
        ends = (theirs_in, theirs_out)
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, *map(str, ends), *command], pass_fds=ends, stderr=subprocess.DEVNULL
        )
        for end in ends:
            os.close(end)
        self.events: list[dict[str, Any]] = []
        self._buffer = b""
        self._count = 0
        self._session: dict[str, str] = {}
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.close(self._send_end)  # the end of its pipe ends the browser
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._receive_end)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; what else arrives meanwhile is kept in events."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters, **self._session}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._send_end, data) :]
        while (answer := self._next()).get("id") != self._count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, page: Path, *, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until it has loaded, pictures and all."""
        self.events.clear()
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()
        # Pictures from data: URIs are decoded after the load; two frames later the layout is done.
        self.evaluate("Promise.all([...document.images].map((image) => image.decode().catch(() => {})))")
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; awaited where it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[Any]:
        """What the console holds, whatever its level: errors, warnings, violations of the policy, failed requests."""
        methods = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed")
        return [event for event in self.events if event["method"] in methods]

    def requests(self) -> set[str]:
        asked = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        urls = [one["request"]["url"] for one in asked]
        return {"data:" if url.startswith("data:") else url for url in urls}

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._receive_end], [], [], TIMEOUT)[0]:
                raise TimeoutError(f"the browser was silent for {TIMEOUT:.0f} s")
            data = os.read(self._receive_end, 1 << 20)
            if not data:
                raise RuntimeError("the browser ended")
            self._buffer += data
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message
