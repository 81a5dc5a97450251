"""Debian's chromium, driven through selenium without a network: for the browser tests and the docs' screenshots."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

PACKAGES = "chromium and chromium-driver (apt-get install -y chromium chromium-driver)"


def missing() -> str | None:
    """What to install where no browser can be driven, None where all is there."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"there is no {' and no '.join(absent)} here; Debian's packages are {PACKAGES}" if absent else None


@contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[Chrome]:
    """A headless browser with a window of that size and a profile of its own, closed at the end."""
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    with TemporaryDirectory(prefix="kvcycle-chromium-") as profile:
        for argument in (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
        processes: list[psutil.Process] = []
        try:
            resize(browser, width, height)
            yield browser
        finally:
            with suppress(psutil.NoSuchProcess):  # it has ended by itself
                processes = psutil.Process(browser.service.process.pid).children(recursive=True)
            browser.quit()
            psutil.wait_procs(processes, timeout=60)  # one that lives on still writes to the profile


def resize(browser: Chrome, width: int, height: int, *, scale: float = 1.0) -> None:
    """The page's own width and height: a window cannot be as narrow as a phone."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(browser: Chrome, scheme: str) -> None:
    """The system's choice of colours: ``light`` or ``dark``."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def in_a_frame(browser: Chrome, expression: str) -> Any:
    """The value of a JavaScript expression in the next frame: after whatever the page does before it is drawn."""
    return browser.execute_async_script(f"const done = arguments[0]; requestAnimationFrame(() => done({expression}))")


def picture(browser: Chrome, path: Path, *, whole: bool = True) -> None:
    """A screenshot: of the whole page, or of what the window shows."""
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
    path.write_bytes(base64.b64decode(shot["data"]))
