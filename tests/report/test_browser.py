"""The page in a real browser: headless Chromium, driven by selenium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.runs import SCRIPT, make_run, metric_lines, write_lines
from vlmtune.report.page import write_page

selenium = pytest.importorskip("selenium", reason="selenium is not installed")

from selenium.webdriver import ActionChains, Chrome, ChromeOptions, Keys  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

CHROMIUM = next(
    (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))),
    None,
)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no Chromium or no chromedriver is installed"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tiny_vlm: Path) -> Path:
    """40 questions: 9 broken, 10 wrong, 10 fixed, 11 right; three answers are markup."""
    before = ["yes", "no"] * 20
    after = ["no", "no", "yes", "yes"] * 10
    after[0] = after[4] = after[8] = SCRIPT
    after[12] = "yes"
    run = make_run(
        tmp_path_factory.mktemp("runs") / "receipts",
        model=tiny_vlm,
        num_samples=40,
        before=before,
        after=after,
    )
    ranks = {f"model.layers.{n}.self_attn.a_long_module_name_proj": 4 for n in range(30)}
    lines = [line | ({"ranks": ranks} if line["step"] else {}) for line in metric_lines(30)]
    write_lines(run / "metrics.jsonl", lines)
    return write_page(run).path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def shown(chromium: Chrome, page: Path) -> Iterator[Chrome]:
    """The page, freshly loaded on a wide screen; nothing may be on the console afterwards."""
    show(chromium, page, width=1200)
    yield chromium
    assert chromium.get_log("browser") == []


def show(chromium: Chrome, page: Path, *, width: int, dark: bool = False) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
        {"name": "prefers-reduced-motion", "value": "reduce"},  # a click waits for no scrolling
    ]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    chromium.get(page.as_uri())
    chromium.execute_script("localStorage.clear()")


def element(chromium: Chrome, selector: str) -> Any:
    return chromium.find_element(By.CSS_SELECTOR, selector)


def outcomes(chromium: Chrome) -> list[str]:
    """The outcome of each card that can be seen."""
    cards = chromium.find_elements(By.CSS_SELECTOR, ".card:not([hidden])")
    return [str(card.get_attribute("data-outcome")) for card in cards]


def press(chromium: Chrome, *keys: str) -> None:
    ActionChains(chromium).send_keys(*keys).perform()


def background(chromium: Chrome) -> str:
    return str(chromium.execute_script("return getComputedStyle(document.body).backgroundColor"))


def test_markup_in_an_answer_is_shown_and_not_run(shown: Chrome) -> None:
    assert shown.title == "receipts · vlmtune report"
    said = shown.find_elements(By.CSS_SELECTOR, ".broken dd.after .said")
    assert [answer.get_attribute("textContent") for answer in said].count(SCRIPT) == 3
    assert shown.find_elements(By.CSS_SELECTOR, "main script") == []


def test_the_policy_refuses_a_script_that_got_in(chromium: Chrome, page: Path) -> None:
    show(chromium, page, width=1200)
    chromium.execute_script(
        "const s = document.createElement('script'); s.textContent = \"document.title = 'stolen'\";"
        "document.body.append(s)"
    )
    assert chromium.title == "receipts · vlmtune report"
    refused = chromium.get_log("browser")
    assert len(refused) == 1 and "Content Security Policy" in refused[0]["message"]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("Wrong", {"broken": 9, "wrong": 10}),
        ("Right", {"fixed": 10, "right": 11}),
        ("Changed", {"broken": 9, "fixed": 10}),
        ("Fixed", {"fixed": 10}),
        ("Broken", {"broken": 9}),
    ],
)
def test_cards_are_filtered_by_outcome(shown: Chrome, label: str, expected: dict[str, int]) -> None:
    button = shown.find_element(By.XPATH, f"//button[text()='{label}']")
    button.click()
    found = outcomes(shown)
    assert {name: found.count(name) for name in set(found)} == expected
    assert button.get_attribute("aria-pressed") == "true"
    assert element(shown, "#num-shown").text == f"{sum(expected.values())} of 40 match"


def test_cards_are_filtered_by_kind_and_by_text(shown: Chrome) -> None:
    element(shown, "#slice").send_keys("shape")
    assert element(shown, "#num-shown").text == "20 of 40 match"
    element(shown, "#search").send_keys("NUMBER 7?")
    assert element(shown, "#num-shown").text == "1 of 40 match"
    assert outcomes(shown) == ["fixed"]


def test_more_cards_come_on_demand(shown: Chrome) -> None:
    assert len(outcomes(shown)) == 24
    more = element(shown, "#more")
    assert more.text == "Show 16 more"
    more.click()
    assert len(outcomes(shown)) == 40
    assert not more.is_displayed()


def test_filters_and_charts_are_reached_by_keyboard(shown: Chrome) -> None:
    press(shown, Keys.TAB)
    assert shown.switch_to.active_element.text == "Skip to the report"
    press(shown, Keys.ENTER)
    assert shown.switch_to.active_element.get_attribute("id") == "main"
    for _ in range(40):
        press(shown, Keys.TAB)
        if shown.switch_to.active_element.text == "Broken":
            break
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert shown.execute_script(outline) == "solid"
    press(shown, Keys.SPACE)
    assert set(outcomes(shown)) == {"broken"}


def test_a_chart_is_read_and_zoomed_by_keyboard(shown: Chrome) -> None:
    whole = element(shown, "#chart-0 .lines").get_dom_attribute("viewBox")
    shown.execute_script("document.querySelector('#chart-0 .plot').focus()")
    press(shown, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    readout = element(shown, "#readout").get_attribute("textContent")
    assert readout == "step 2: training 1.333, held-out 4 (step 0)"
    press(shown, "+")
    assert element(shown, "#chart-0 .lines").get_dom_attribute("viewBox") != whole
    assert (
        element(shown, "#chart-1 .lines").get_dom_attribute("viewBox") != whole
    )  # all zoom together
    assert element(shown, "#chart-0 .reset").is_displayed()
    press(shown, "0")
    assert element(shown, "#chart-0 .lines").get_dom_attribute("viewBox") == whole
    assert not element(shown, "#chart-0 .reset").is_displayed()


def test_a_chart_is_read_by_hovering_and_zoomed_by_dragging(shown: Chrome) -> None:
    plot = element(shown, "#chart-0 .plot")
    shown.execute_script("arguments[0].scrollIntoView({behavior: 'instant'})", plot)
    ActionChains(shown).move_to_element(plot).perform()
    assert element(shown, "#chart-0 .cursor").get_attribute("visibility") == "visible"
    assert element(shown, "#chart-0 output").text == "0.25"  # 4 / (1 + 15) at step 15
    drag = ActionChains(shown).move_to_element(plot).click_and_hold()
    drag.move_by_offset(plot.size["width"] // 4, 0).release().perform()
    left, _, width, _ = map(
        float, str(element(shown, "#chart-0 .lines").get_dom_attribute("viewBox")).split()
    )
    assert (left, width) == pytest.approx((500, 250), abs=10)
    element(shown, "#chart-0 .reset").click()
    assert element(shown, "#chart-0 .lines").get_dom_attribute("viewBox") == "0 0 1000 1000"


def test_the_wheel_zooms_only_a_chart_that_was_clicked(shown: Chrome) -> None:
    plot = element(shown, "#chart-0 .plot")
    shown.execute_script("arguments[0].scrollIntoView({behavior: 'instant'})", plot)
    wheel = (
        "arguments[0].dispatchEvent(new WheelEvent('wheel',"
        "{deltaY: -1, clientX: 600, bubbles: true, cancelable: true}))"
    )
    shown.execute_script(wheel, plot)
    assert element(shown, "#chart-0 .lines").get_dom_attribute("viewBox") == "0 0 1000 1000"
    plot.click()
    shown.execute_script(wheel, plot)
    assert element(shown, "#chart-0 .lines").get_dom_attribute("viewBox") != "0 0 1000 1000"


def test_a_narrow_screen_leaves_room_for_the_ranks(chromium: Chrome, page: Path) -> None:
    show(chromium, page, width=320)
    assert element(chromium, ".rank-row svg").size["width"] > 80


@pytest.mark.parametrize("width", [320, 768, 1920])
def test_no_width_makes_the_page_scroll_sideways(chromium: Chrome, page: Path, width: int) -> None:
    show(chromium, page, width=width)
    wide = chromium.execute_script(
        "document.querySelectorAll('details').forEach((d) => { d.open = true; });"
        "return [document.documentElement.scrollWidth, innerWidth]"
    )
    assert wide[0] <= wide[1] == width
    assert chromium.get_log("browser") == []


def test_colors_follow_the_system_until_the_button_says_otherwise(
    chromium: Chrome, page: Path
) -> None:
    show(chromium, page, width=1200)
    light = background(chromium)
    show(chromium, page, width=1200, dark=True)
    dark = background(chromium)
    assert light != dark
    element(chromium, "#theme").click()
    assert background(chromium) == light
    chromium.refresh()
    assert background(chromium) == light  # remembered
    assert chromium.get_log("browser") == []


def test_without_scripts_the_page_is_whole(chromium: Chrome, page: Path) -> None:
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.get(page.as_uri())
        assert not element(chromium, ".filters").is_displayed()
        assert element(chromium, "#chart-0 .line").get_attribute("d").startswith("M")
        assert len(outcomes(chromium)) == 40
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_page_prints(chromium: Chrome, page: Path) -> None:
    show(chromium, page, width=1200)
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not element(chromium, "nav").is_displayed()
    assert not element(chromium, ".filters").is_displayed()
    assert element(chromium, "#chart-0").is_displayed()
    printed = chromium.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert len(printed["data"]) > 10_000
