"""A real browser, headless, driven over WebDriver (https://www.w3.org/TR/webdriver2/)."""

from __future__ import annotations

import base64
import json
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.rigs import accepts, free_port, need_program, wait_until

_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
_TEXT = "const one = document.querySelector(arguments[0]); return one?.checkVisibility() ? one.innerText : ''"
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """Chromium with a profile of its own in `folder`."""

    def __init__(self, folder: Path, *, width: int = 1280, height: int = 900) -> None:
        driver, chromium = need_program("chromedriver", "chromium-driver"), need_program("chromium", "chromium")
        port = free_port()
        self._folder = folder
        self._url = f"http://127.0.0.1:{port}"
        self._log = (folder / "chromedriver.log").open("wb")
        self._process = subprocess.Popen([driver, f"--port={port}"], stdout=self._log, stderr=subprocess.STDOUT)
        options = [*_OPTIONS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": chromium, "args": options},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        try:
            wait_until(lambda: accepts(port), what="chromedriver listens")
            session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        except BaseException:
            self._end()
            raise
        self._url = f"{self._url}/session/{session}"

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """As a person reads it; empty where there is no such element, or none is visible."""
        return str(self.run(_TEXT, selector))

    def click(self, selector: str) -> None:
        self._ask("POST", f"/element/{self._find(selector)}/click", {})

    def send_keys(self, selector: str, text: str) -> None:
        self._ask("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def emulate(self, *, width: int, height: int, dark: bool) -> None:
        """A screen of this size, which may be smaller than a window can be, and a person who likes it dark."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._devtools("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self) -> list[str]:
        """What the console has said since the last call: errors, warnings, violations of the page's policy."""
        entries = self._ask("POST", "/se/log", {"type": "browser"})
        return [f"{entry['level']} {entry['message']}" for entry in entries if entry["level"] != "INFO"]

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG, beyond what fits the window too."""
        size = self.run("return { width: innerWidth, height: document.documentElement.scrollHeight }")
        clip = {"x": 0, "y": 0, "scale": 1, **size}
        shot = self._devtools("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(shot["data"]))

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is not None:
                print(self.text("body")[:3000], *self.complaints(), f"see {self._folder}/page.png", sep="\n")
                self.screenshot(self._folder / "page.png")
            self._ask("DELETE", "", None)
        finally:
            self._end()

    def _find(self, selector: str) -> str:
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        return str(found[_ELEMENT])

    def _devtools(self, command: str, params: Any) -> Any:
        """Of the browser itself: https://chromedevtools.github.io/devtools-protocol/."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def _ask(self, method: str, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            self._url + path,
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Content-Type": "application/json", "Host": urlsplit(self._url).netloc},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{method} {path}: {error.read().decode()[:500]}") from None

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()
