"""A headless Chromium, driven by its DevTools protocol over two pipes."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patience import SOON_S, WAIT_S

NAMES = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser")
BROWSER = next(filter(None, map(shutil.which, (*NAMES, "google-chrome"))), None)


class PageError(AssertionError):
    """The page's script threw an exception."""


def _pipe() -> list[int]:
    """The ends of a pipe, to read and to write, with numbers above those that the browser uses."""
    ends = []
    for end in os.pipe():
        ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(end)
    return ends


class Browser:
    """The process. Its answers and events come in order; one thread uses it."""

    def __init__(self, profile: Path) -> None:
        assert BROWSER is not None
        asked, self._out = _pipe()
        self._in, answered = _pipe()
        # The browser reads commands from file 3 and writes to file 4.
        shell = f'exec "$0" "$@" 3<&{asked} 4>&{answered}'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--no-proxy-server", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, BROWSER, *flags],
            pass_fds=(asked, answered),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(asked)
        os.close(answered)
        self._ids = itertools.count(1)
        self._buffer = bytearray()
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        id = next(self._ids)
        message = {"id": id, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != id:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], SOON_S)[0], "the browser does not answer"
            piece = os.read(self._in, 1 << 16)
            assert piece, "the browser has ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    @contextmanager
    def page(self, url: str) -> Iterator[Page]:
        """A tab of its own, with a memory of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, session["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.open(url)
        yield page
        self.call("Target.disposeBrowserContext", browserContextId=context)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, expression: str) -> Any:
        """The value of an expression, or of its promise. Raises PageError."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in answer:
            raise PageError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The value of an expression as soon as it is true; an element's value is true."""
        look = f"(found => found instanceof Node || found)({expression})"
        limit = time.monotonic() + WAIT_S
        while not (value := self.run(look)):
            assert time.monotonic() < limit, f"{expression}; the page is {self.text('body')!r}"
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> Any:
        """The text that is seen, of the last element that matches; None if there is none."""
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.innerText")

    def click(self, selector: str) -> None:
        """A click of the mouse at the middle of an element, which must be there in view."""
        where = self.run(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            place = {"x": where[0], "y": where[1], "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **place)

    def write(self, selector: str, text: str) -> None:
        """Type over what a field holds."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{field}.focus(), {field}.select()")
        self.call("Input.insertText", text=text)

    def enter(self) -> None:
        for kind in ("rawKeyDown", "char", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.call("Input.dispatchKeyEvent", type=kind, **key)

    def complaints(self) -> list[str]:
        """What the browser says in its console: refused loads, exceptions."""
        self.run("0")  # events that come before its answer have been read
        found = []
        for event in self._browser.events:
            if event.get("sessionId") == self._session:
                if event["method"] == "Log.entryAdded":
                    found.append(str(event["params"]["entry"]["text"]))
                if event["method"] == "Runtime.exceptionThrown":
                    found.append(str(event["params"]["exceptionDetails"]))
        return found
