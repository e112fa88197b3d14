"""A real browser without a window, for tests: `with Browser() as browser: browser.open(page)`.

Chromium, told what to do through a pipe (its DevTools protocol): keys are real input, and every
request that a page makes is seen. Its profile is thrown away.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

APT = "apt-get install -y --no-install-recommends chromium"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 120.0  # seconds for one answer: a machine may be busy


def find() -> str | None:
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    def __enter__(self) -> Browser:
        program = find()
        assert program, f"there is no browser: {APT}"
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        words = [
            program,
            "--headless",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]
        words += [f"--user-data-dir={self.profile.name}", "--remote-debugging-pipe", "about:blank"]
        if os.geteuid() == 0:
            words.insert(1, "--no-sandbox")  # it refuses root otherwise
        # The protocol is spoken on descriptors 3 and 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *words],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.out, self.into = ours_out, ours_in
        self.buffer, self.sent, self.session = b"", 0, None
        self.requests: list[str] = []  # addresses that pages asked for
        self.loaded = 0
        self.errors: list[str] = []  # exceptions in pages, and what their policy forbade
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.out)  # it ends, and its children with it
        os.close(self.into)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.profile.cleanup()

    def open(self, page: Path) -> None:
        before = self.loaded
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self.loaded == before:
            self._read()

    def value(self, expression: str) -> Any:
        """Of JavaScript in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def type(self, element: str, text: str) -> None:
        """Write into a field, in place of what is there."""
        self.value(f"document.getElementById('{element}').select()")
        self.value(f"document.getElementById('{element}').focus()")
        if text:
            self.call("Input.insertText", text=text)
        else:
            self.press("Delete", 46)

    def press(self, key: str, code: int, element: str | None = None) -> None:
        if element:
            self.value(f"document.getElementById('{element}').focus()")
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        message: dict[str, Any] = {"id": self.sent, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        """The next message; what tells of the page is noted."""
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.into], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self.into, 1 << 16) if ready else b""
            assert data, f"the browser said nothing (exit status {self.process.poll()})"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        params = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif message.get("method") == "Page.loadEventFired":
            self.loaded += 1
        elif message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])
        return message
