"""The page in a real browser, opened from the disk: what a person sees, points at, presses and prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from kvcycle.record import Record
from kvcycle.report.page import faults
from scripts.chromium import in_a_frame, prefer, resize
from tests.unit.records import BORROWED, good_record, shift
from tests.unit.soaks import good_soak, hold
from tests.unit.test_report_faults import ACCUSED, MISSED, result

pytestmark = pytest.mark.browser

GOOD = good_record(allocator=True, release_weights=True)
FAILED = shift(GOOD, BORROWED, 512)
LEAK = hold(good_soak(), range(1, 41), lambda cycle: 512 * cycle)

Open = Callable[[str], None]
OpenRecord = Callable[[Record], None]


def find(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def bar(browser: Chrome, phase: str) -> WebElement:
    return find(browser, f'.col[data-phase="{phase}"]')


def tip(element: WebElement) -> str:
    return element.find_element(By.CSS_SELECTOR, ".tip").text


def width(browser: Chrome) -> int:
    """What the page would have to be scrolled to, sideways."""
    return int(browser.execute_script("return document.documentElement.scrollWidth"))


def ground(browser: Chrome) -> str:
    """The colour under everything, as the page draws it."""
    return str(in_a_frame(browser, "getComputedStyle(document.body).backgroundColor"))


def until_open(browser: Chrome, details: WebElement) -> None:
    """Wait for it: a link tells the page of its click in an event of its own."""
    WebDriverWait(browser, 60).until(lambda _: details.get_attribute("open") == "true")


LIGHT, DARK = "rgb(246, 247, 249)", "rgb(15, 20, 27)"


def test_the_verdict_is_what_one_sees_first(browser: Chrome, open_record: OpenRecord) -> None:
    open_record(GOOD)
    assert browser.title == "PASSED tiny [measured-on-tpu] – kvcycle"
    assert find(browser, "h1").text == "PASSED tiny on 4 TPU v4 devices"
    assert find(browser, ".label").text == "measured-on-tpu"
    assert [e.text for e in browser.find_elements(By.CSS_SELECTOR, ".answer .big")] == ["Yes"] * 3
    for selector in ("h1", ".answer .big"):
        box = find(browser, selector).rect
        assert box["y"] + box["height"] < 900
    open_record(FAILED)
    assert find(browser, "h1").text.startswith("FAILED")
    assert "drop.frees_kv fail" in find(browser, ".misses").text


def test_of_a_thousand_devices_the_odd_one_is_seen_with_its_host(browser: Chrome, open_record: OpenRecord) -> None:
    def elements() -> int:
        return int(browser.execute_script("return document.querySelectorAll('*').length"))

    open_record(FAILED)
    few = elements()
    open_record(shift(good_record(allocator=True, cycles=1, devices=1000, hosts=250), BORROWED, 512, device=617))
    assert elements() < 1.2 * few
    assert find(browser, "h1").text == "FAILED tiny on 1,000 TPU v4 devices of 250 hosts"
    assert "device617 (host 154)" in find(browser, ".misses").text
    said = find(browser, "#hosts").text
    assert (
        "1,000 devices on 250 hosts, 4 on each. What did not pass is on 1 of 250 hosts: device 617 (host 154)." in said
    )
    assert "hosts 0–153, 155–249 249 alike" in said
    find(browser, "#find").send_keys("device 617 (host 154)")
    assert find(browser, "#found").text.startswith("2 of ")
    for pixels in (360, 1280):
        resize(browser, pixels, 800)
        assert width(browser) == pixels


def test_a_bar_that_is_pointed_at_says_its_bytes_exactly(browser: Chrome, open_record: OpenRecord) -> None:
    open_record(GOOD)
    dropped = bar(browser, "kv_cache_dropped")
    assert tip(dropped) == ""
    ActionChains(browser).scroll_to_element(dropped).move_to_element(dropped).perform()
    said = tip(dropped)
    for line in ("Weights\n5.27 MiB (5,526,528 B)", "Predicted\n5.27 MiB (5,526,632 B)", "Difference\n0 B"):
        assert line in said
    assert "KV cache\n" not in said
    wide = browser.execute_script(
        "return [...document.querySelectorAll('.tip')].filter(e => e.scrollWidth > e.clientWidth).length"
    )
    assert wide == 0
    rebuilt = bar(browser, "kv_cache_rebuilt")
    ActionChains(browser).move_to_element(rebuilt).perform()
    assert "KV cache\n32.00 MiB (33,556,480 B)" in tip(rebuilt)
    assert tip(dropped) == ""


def test_a_bar_is_reached_by_keyboard(browser: Chrome, open_record: OpenRecord) -> None:
    open_record(GOOD)
    ActionChains(browser).move_by_offset(1, 1).perform()
    visited = []
    for _ in range(30):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        visited.append(browser.switch_to.active_element.get_attribute("data-phase"))
        if visited[-1]:
            break
    assert visited[-1] == "engine_ready"
    assert "KV cache\n32.00 MiB (33,556,480 B)" in tip(browser.switch_to.active_element)
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    focused = browser.switch_to.active_element
    assert focused.get_attribute("data-phase") == "kv_cache_dropped"
    assert "5,526,528 B" in tip(focused)
    assert "Weights 5.27 MiB (5,526,528 B)" in str(focused.get_attribute("aria-label"))
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert tip(focused) == ""


def test_the_pointer_and_the_keyboard_do_not_show_two_bars_at_once(browser: Chrome, open_record: OpenRecord) -> None:
    def shown() -> list[str]:
        return [
            str(e.get_attribute("data-phase")) for e in browser.find_elements(By.CSS_SELECTOR, ".col") if tip(e) != ""
        ]

    open_record(GOOD)
    ready, rebuilt = bar(browser, "engine_ready"), bar(browser, "kv_cache_rebuilt")
    ActionChains(browser).scroll_to_element(ready).move_to_element(ready).perform()
    assert shown() == ["engine_ready"]
    ready.send_keys(Keys.ARROW_RIGHT)
    assert shown() == ["generate_result"]
    ActionChains(browser).move_to_element(rebuilt).perform()
    assert shown() == ["kv_cache_rebuilt"]


def test_bars_are_as_high_as_their_bytes(browser: Chrome, open_record: OpenRecord) -> None:
    open_record(GOOD)

    def height(phase: str) -> float:
        segments = bar(browser, phase).find_elements(By.CSS_SELECTOR, ".seg")
        return float(sum(segment.rect["height"] for segment in segments))

    held = {one.name: one.devices[0].allocator_bytes or 0 for one in GOOD.cycles[0].phases}
    for phase in ("kv_cache_dropped", "kv_cache_rebuilt"):
        assert height(phase) / height("engine_ready") == pytest.approx(held[phase] / held["engine_ready"], rel=0.01)
    feet = {round(e.rect["y"] + e.rect["height"]) for e in browser.find_elements(By.CSS_SELECTOR, ".room")}
    assert len(feet) == 1


def test_the_whole_device_is_drawn_when_asked_for(browser: Chrome, open_record: OpenRecord) -> None:
    open_record(GOOD)
    limit = find(browser, ".limit")
    assert not limit.is_displayed()
    before = bar(browser, "engine_ready").find_element(By.CSS_SELECTOR, ".kv").rect["height"]
    find(browser, ".to-limit").click()
    assert limit.text == "limit 30.75 GiB (33,017,561,088 B)"
    assert bar(browser, "engine_ready").find_element(By.CSS_SELECTOR, ".kv").rect["height"] < before / 50


def test_dark_is_the_systems_or_the_buttons_and_is_remembered(browser: Chrome, open_record: OpenRecord) -> None:
    open_record(GOOD)
    assert ground(browser) == LIGHT
    prefer(browser, "dark")
    assert ground(browser) == DARK
    find(browser, "#theme").click()
    assert ground(browser) == LIGHT
    browser.refresh()
    assert ground(browser) == LIGHT
    prefer(browser, "light")
    find(browser, "#theme").click()
    assert ground(browser) == DARK
    assert find(browser, "#theme").text == "Light"


def test_no_reload_of_a_page_from_the_disk_loses_the_choice(browser: Chrome, open_record: OpenRecord) -> None:
    """Read before the first frame, the storage was another, empty one in about every tenth page (chromium 156)."""
    open_record(GOOD)
    for chosen, offered in [(DARK, "Light"), (LIGHT, "Dark")] * 8:
        find(browser, "#theme").click()
        browser.refresh()
        assert (ground(browser), find(browser, "#theme").text) == (chosen, offered)


def test_a_browser_that_keeps_nothing_switches_all_the_same(browser: Chrome, open_record: OpenRecord) -> None:
    forbid = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError') }})"
    script: Any = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": forbid})
    try:
        open_record(GOOD)
        assert browser.execute_script("try { return String(localStorage) } catch (error) { return error.name }") == (
            "SecurityError"
        )
        find(browser, "#theme").click()
        assert ground(browser) == DARK
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


PAGES = {"good": GOOD, "failed": FAILED, "soak": LEAK, "256 devices": good_record(devices=256, allocator=True)}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("pixels", [360, 768, 1280])
def test_no_width_needs_scrolling_sideways(name: str, pixels: int, browser: Chrome, open_record: OpenRecord) -> None:
    open_record(PAGES[name])
    resize(browser, pixels, 800)
    find(browser, "[data-open]").click()
    assert width(browser) == pixels
    small = browser.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e => e.children.length === 0 && e.textContent.trim() "
        "&& e.checkVisibility() && parseFloat(getComputedStyle(e).fontSize) < 10).map(e => e.outerHTML)"
    )
    assert small == []


def test_on_a_phone_the_bars_lie_down(browser: Chrome, open_record: OpenRecord) -> None:
    open_record(GOOD)
    resize(browser, 360, 800)
    first, second = bar(browser, "engine_ready"), bar(browser, "generate_result")
    assert first.rect["x"] == second.rect["x"]
    assert first.rect["y"] + first.rect["height"] <= second.rect["y"]
    weights, kv = (first.find_element(By.CSS_SELECTOR, f".{owner}").rect for owner in ("weights", "kv"))
    assert weights["y"] == kv["y"]
    assert kv["width"] / weights["width"] == pytest.approx(33_556_480 / 5_526_528, rel=0.05)
    first.click()
    assert "33,556,480 B" in tip(first)
    assert width(browser) == 360


def test_failures_are_open_and_the_checks_can_be_searched(browser: Chrome, open_record: OpenRecord) -> None:
    def shown() -> list[str]:
        found = browser.find_elements(By.CSS_SELECTOR, "details.check")
        return [str(e.get_attribute("id")).removeprefix("check-") for e in found if e.is_displayed()]

    open_record(FAILED)
    everything = shown()
    first = find(browser, "details.check")
    assert (everything[0], first.get_attribute("open")) == ("drop.frees_kv", "true")
    assert "Likely: a buffer was not deleted" in first.text
    find(browser, '[data-show="red"]').click()
    assert set(shown()) == {"drop.frees_kv", "controls.witnesses_agree"}
    find(browser, "#find").send_keys("witnesses")
    assert shown() == ["controls.witnesses_agree"]
    find(browser, '[data-show="all"]').click()
    find(browser, "#find").clear()
    find(browser, "#find").send_keys("no such word")
    assert shown() == []
    assert find(browser, "#found").text == f"0 of {len(everything)} checks"


def test_a_link_opens_its_check(browser: Chrome, open_record: OpenRecord) -> None:
    open_record(FAILED)
    target = find(browser, '[id="check-drop.frees_kv"]')
    browser.execute_script("arguments[0].open = false", target)
    find(browser, ".misses a").click()
    until_open(browser, target)


def test_the_soaks_curves_are_read_by_pointer_and_by_keyboard(browser: Chrome, open_record: OpenRecord) -> None:
    open_record(LEAK)
    growth = find(browser, ".curve")
    assert "device 1 20,480 B" in growth.text
    slider = find(browser, "#cycle")
    ActionChains(browser).scroll_to_element(slider).click(slider).perform()
    slider.send_keys(Keys.HOME)
    assert "device 1 512 B" in growth.text
    slider.send_keys(Keys.ARROW_RIGHT)
    assert "device 1 1,024 B" in growth.text
    canvas = growth.find_element(By.CSS_SELECTOR, ".canvas")
    ActionChains(browser).scroll_to_element(canvas).move_to_element_with_offset(
        canvas, int(canvas.rect["width"] / 2) - 1, 0
    ).perform()
    assert "device 1 20,480 B" in growth.text
    assert find(browser, "#at-cycle").text == "40"


def test_it_prints_light_open_and_without_buttons(browser: Chrome, open_record: OpenRecord) -> None:
    closed = "document.querySelectorAll('details:not([open])').length"
    open_record(FAILED)
    find(browser, "#theme").click()
    before = browser.execute_script(f"return {closed}")
    assert before > 0
    browser.execute_script(f"addEventListener('beforeprint', () => {{ window.printed = {closed} }})")
    assert len(browser.print_page()) > 20_000
    assert browser.execute_script("return window.printed") == 0
    assert browser.execute_script(f"return {closed}") == before
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert ground(browser) == "rgb(255, 255, 255)"
        assert browser.execute_script("return getComputedStyle(document.body).color") == "rgb(23, 32, 43)"
        assert not find(browser, "#theme").is_displayed()
        assert not find(browser, ".filter").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_faults_have_their_matrix(browser: Chrome, open_page: Open) -> None:
    open_page(faults.draw([result(), MISSED, ACCUSED], name="tiny", whole=False))
    assert find(browser, "h1").text == "FAILED planted faults on tiny"
    assert [e.text for e in browser.find_elements(By.CSS_SELECTOR, ".matrix .wrong")] == ["M", "!"]
    for pixels in (360, 1280):
        resize(browser, pixels, 800)
        assert width(browser) == pixels
    find(browser, ".matrix tbody tr:last-child a").click()
    until_open(browser, find(browser, "#fault-a-fault"))


def test_an_error_in_the_console_would_be_seen(one_browser: Chrome, open_page: Open) -> None:
    open_page("<!doctype html><title>x</title><script>throw new Error('planted')</script>")
    assert any("planted" in entry["message"] for entry in one_browser.get_log("browser"))
