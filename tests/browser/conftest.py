"""One headless chromium for all browser tests; where there is none they skip, or fail if CI asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from kvcycle.checks import judge
from kvcycle.record import Record
from kvcycle.report import page
from scripts import chromium

Open = Callable[[str], None]


@pytest.fixture(scope="module")  # a whole session would keep it running beside all other tests
def one_browser() -> Iterator[Chrome]:
    if (problem := chromium.missing()) is not None:
        if os.environ.get("KVCYCLE_REQUIRE_BROWSER", "0") not in ("", "0"):
            pytest.fail(f"KVCYCLE_REQUIRE_BROWSER is set, but {problem}.", pytrace=False)
        pytest.skip(problem)
    with chromium.chromium() as browser:
        yield browser


@pytest.fixture
def browser(one_browser: Chrome) -> Iterator[Chrome]:
    """The browser as a newcomer has it: a large light window, no choice of colours kept; at the end no error in it."""
    chromium.resize(one_browser, 1280, 900)
    chromium.prefer(one_browser, "light")
    one_browser.get_log("browser")
    yield one_browser
    assert one_browser.get_log("browser") == []


@pytest.fixture
def open_page(browser: Chrome, tmp_path: Path) -> Open:
    """Write a text as a file and open it from the disk."""

    def opened(text: str) -> None:
        file = tmp_path / "index.html"
        file.write_text(text, encoding="utf-8")
        browser.get(file.as_uri())
        chromium.in_a_frame(browser, "(() => { try { localStorage.clear() } catch (error) {} })()")
        browser.refresh()

    return opened


@pytest.fixture
def open_record(open_page: Open) -> Callable[[Record], None]:
    """Judge a record, draw it, and open the page from the disk."""
    return lambda record: open_page(page.draw(record, judge(record)))
