"""Draw the docs' screenshots anew: python -m scripts.screenshots

Saved and made-up records are drawn as pages, opened in Debian's chromium, and written to docs/images/.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By

from kvcycle.checks import judge
from kvcycle.record import Record
from kvcycle.report import page
from scripts.chromium import chromium, missing, picture, prefer, resize
from tests.unit.records import BORROWED, shift

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
TINY = ROOT / "tests" / "data" / "tiny.record.json"
#: What a README takes without thinking of it.
MOST_BYTES = 200_000


@dataclass(frozen=True)
class Shot:
    """One screenshot: of which record, in which colours and window, from which part on, and the bar pointed at."""

    name: str
    record: Record
    scheme: str
    width: int = 1180
    height: int = 1250
    part: str = ""
    point_at: str | None = None


def shots() -> list[Shot]:
    """What the docs show."""
    tiny = Record.load(TINY)
    return [
        Shot("passed-light", tiny, "light", point_at="kv_cache_dropped"),
        Shot("passed-dark", tiny, "dark"),
        Shot("failed-light", shift(tiny, BORROWED, 3 * 2**20), "light", height=1060, part="#memory"),
        Shot("phone-light", tiny, "light", width=360, height=1000, part="#memory"),
    ]


def take(browser: Chrome, shot: Shot, folder: Path) -> Path:
    """Draw one record, open its page, and write what the window shows as a PNG of at most 256 colours."""
    file = folder / f"{shot.name}.html"
    page.write(shot.record, judge(shot.record), file)
    prefer(browser, shot.scheme)
    resize(browser, shot.width, shot.height)
    browser.get(file.as_uri() + shot.part)
    if shot.point_at is not None:
        bar = browser.find_element(By.CSS_SELECTOR, f'.col[data-phase="{shot.point_at}"]')
        ActionChains(browser).move_to_element(bar).perform()
    raw, path = folder / f"{shot.name}.png", IMAGES / f"{shot.name}.png"
    picture(browser, raw, whole=False)
    with Image.open(raw) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def main() -> int:
    """Take them all; 1 if there is no browser, or one is too large."""
    if (problem := missing()) is not None:
        print(f"No screenshot was taken: {problem}.", file=sys.stderr)
        return 1
    IMAGES.mkdir(parents=True, exist_ok=True)
    too_large = 0
    with tempfile.TemporaryDirectory(prefix="kvcycle-screenshots-") as folder, chromium() as browser:
        for shot in shots():
            path = take(browser, shot, Path(folder))
            size = path.stat().st_size
            too_large += size > MOST_BYTES
            print(f"{path.relative_to(ROOT)}  {shot.width} x {shot.height}  {size:,} B")
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main())
