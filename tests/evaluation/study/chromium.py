"""A page in headless Chromium, driven over the pipe of its DevTools protocol, without further packages."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

# Seconds until an unanswered command or an unfulfilled condition is an error; a busy machine is slow.
PATIENCE = 60
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Backspace": 8}


def find_chromium() -> str | None:
    """The path of the browser; None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


class BrowserError(Exception):
    """A command failed."""


class Page:
    """A tab of a browser of its own.

    Args:
        profile: Folder that holds what pages store: two browsers with the same one, after each other, share it.
        downloads: Folder for files that the page saves.
    """

    def __init__(self, profile: Path, downloads: Path, width: int = 1300, height: int = 1000) -> None:
        self.errors: list[str] = []
        self._count, self._received = 0, b""
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        options += [f"--user-data-dir={profile}", f"--window-size={width},{height}", "--no-first-run", "about:blank"]
        # The browser reads commands from descriptor 3 and writes to 4.
        script = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, str(find_chromium()), *options],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._session: str | None = None
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")
        self.send("Runtime.enable")
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        self.send("Browser.close")
        self._process.wait(PATIENCE)
        os.close(self._read)
        os.close(self._write)

    def send(self, method: str, **parameters: object) -> dict:
        """Send a command and return its result."""
        self._count += 1
        message: dict[str, object] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"]["exceptionDetails"]))
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise BrowserError(answer["error"])
                return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._received:
            assert select.select([self._read], [], [], PATIENCE)[0], "the browser does not answer"
            chunk = os.read(self._read, 1 << 16)
            assert chunk, "the browser has ended"
            self._received += chunk
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def open(self, address: str) -> None:
        # An address that differs in its end only would not load the page again.
        self.send("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self) -> None:
        self.run("window.isOld = true")
        self.send("Page.reload")
        self.wait("window.isOld === undefined && document.readyState === 'complete'")

    def run(self, expression: str) -> object:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression in the page is true."""
        end = time.monotonic() + PATIENCE
        while True:
            # While a page loads, there may be none.
            with suppress(BrowserError):
                if self.run(condition):
                    return
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Click the visible element of a CSS selector, as a mouse does."""
        self.wait(f"[...document.querySelectorAll({selector!r})].some((each) => each.offsetParent)")
        found = f"[...document.querySelectorAll({selector!r})].find((each) => each.offsetParent)"
        self.run(f"{found}.scrollIntoView()")
        left, top, width, height = self.run(
            f"((box) => [box.left, box.top, box.width, box.height])({found}.getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send(
                "Input.dispatchMouseEvent",
                type=kind,
                x=left + width / 2,
                y=top + height / 2,
                button="left",
                clickCount=1,
            )

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def text(self, selector: str) -> str:
        """The visible text of an element; empty if it is hidden."""
        found = f"document.querySelector({selector!r})"
        return str(self.run(f"{found}.offsetParent ? {found}.innerText : ''"))

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
