"""A page in headless Chromium, driven by its DevTools protocol over a pipe: clicks, keys, and what there is to see."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: The browser, or None; Debian's package is ``chromium``.
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: How long to wait for an answer, in seconds.
PATIENCE = 60
#: Runs the browser with the pipes where it looks for them.
STARTER = """\
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for place, pipe in zip((3, 4), pipes):
    os.dup2(pipe, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One page."""

    def __init__(self, write: int, read: int) -> None:
        self.write, self.read = write, read
        self.numbers = itertools.count(1)
        self.buffer = b""
        self.session: str | None = None
        #: what the page complained of: exceptions, and whatever it tried to load
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.note(answer)

    def receive(self) -> Any:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError("Chromium did not answer")
            more = os.read(self.read, 1 << 16)
            if not more:
                raise RuntimeError("Chromium has ended")
            self.buffer += more
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def note(self, event: Any) -> None:
        method, about = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(about["exceptionDetails"].get("exception", about)))
        elif method == "Log.entryAdded":
            self.problems.append(about["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])

    def open(self, path: Path, size: tuple[int, int] = (1400, 900), dark: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.as_uri())
        until = time.monotonic() + PATIENCE
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.protocol") != "file:":
            assert time.monotonic() < until, "the page did not load"

    def evaluate(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Click in the middle of what ``selector`` finds first, with the mouse."""
        found = f"document.querySelector({json.dumps(selector)})"
        box, before = self.scrolled_to(found), None
        while box != before:  # what comes into sight is laid out, which moves what is below
            box, before = self.scrolled_to(found), box
        place = box[0] + min(box[2] / 2, 60), box[1] + box[3] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def scrolled_to(self, found: str) -> list[float]:
        """Where an element is once it has been scrolled to and drawn."""
        return self.evaluate(
            f"new Promise((done) => {{ {found}.scrollIntoView({{block: 'center'}}); requestAnimationFrame(() =>"
            f" requestAnimationFrame(() => {{ const r = {found}.getBoundingClientRect();"
            " done([r.x, r.y, r.width, r.height]); })); })"
        )

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def screenshot(self, path: Path) -> bytes:
        picture = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(picture)
        return picture


@contextmanager
def chromium() -> Iterator[Page]:
    """Context: a page in a browser of its own."""
    assert BROWSER is not None
    ours, theirs = os.pipe(), os.pipe()  # (read, write): what it is told, and what it says
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            BROWSER, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-dev-shm-usage", "--disable-background-networking", f"--user-data-dir={profile}",
        ]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", STARTER, str(ours[0]), str(theirs[1]), *command],
            pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            os.close(ours[0])
            os.close(theirs[1])
            yield Page(ours[1], theirs[0])
        finally:
            process.terminate()
            process.wait(PATIENCE)
            os.close(ours[1])
            os.close(theirs[0])
