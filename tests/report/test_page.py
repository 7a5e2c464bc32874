"""The page in a real browser: Chromium without a window, opened from file://."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from repeated import repeated

from diffmask_fast.attribution import Attributions
from diffmask_fast.report import html

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run --window-size=1280,1000"
)
Open = Callable[..., Any]


def missing(what: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is not installed, and CI must look at the page in a browser")
    pytest.skip(f"{what} is not installed")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    service = shutil.which("chromedriver")
    if browser is None or service is None:
        missing("chromium with chromedriver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing("selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options, Service(service))
    yield made
    made.quit()


@pytest.fixture
def opened(driver: Any, tmp_path: Path) -> Iterator[Open]:
    """Write a page and open it; after the test, no error was logged and nothing was asked of a network."""
    address = (tmp_path / "page.html").as_uri()

    def open_page(attributions: Attributions, theme: str = "light", **kwargs: Any) -> Any:
        html.write(attributions, tmp_path / "page.html", **kwargs)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get(address)
        return driver

    driver.get("about:blank")
    driver.get_log("browser"), driver.get_log("performance")
    yield open_page
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert asked <= {address, "data:,"} and address in asked


def text(page: Any, name: str) -> str:
    return page.execute_script("return document.getElementById(arguments[0]).textContent", name)


def press(page: Any, name: str, *keys: str) -> None:
    page.find_element("id", name).send_keys(*keys)


def move_to(page: Any, site: int) -> None:
    page.execute_script(
        """const slider = document.getElementById('slider');
        slider.value = arguments[0];
        slider.dispatchEvent(new Event('input'))""",
        site,
    )


def tokens(page: Any) -> list[dict[str, Any]]:
    return page.execute_script("""return [...document.querySelectorAll('.token')].map(t => {
        const style = getComputedStyle(t);
        return {text: t.textContent, kept: t.classList.contains('kept'), title: t.title,
                back: style.backgroundColor, ink: style.color, children: t.children.length}; })""")


def luminance(colour: str) -> float:
    parts = [int(x) / 255 for x in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b  # WCAG 2.2, relative luminance


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_page_shows_the_first_text_at_the_last_site(squad: Attributions, opened: Open) -> None:
    page = opened(squad, title="Kept & dropped")
    assert page.title == text(page, "title") == "Kept & dropped"
    assert [t["text"] for t in tokens(page)] == [token.removeprefix("##") for token in squad.tokens[0]]
    assert text(page, "site") == "13 · last"
    assert text(page, "original") == squad.original[0]


@pytest.mark.parametrize("site", [0, 7, 13])
def test_the_slider_shows_what_holds_at_its_site(squad: Attributions, opened: Open, site: int) -> None:
    page = opened(squad[2:])
    move_to(page, site)
    keep = squad[2].keep[:, site]
    assert [t["kept"] for t in tokens(page)] == (keep > 0.5).tolist()
    assert text(page, "masked") == squad.masked[2][site]
    assert text(page, "kl") == f"{squad.divergence[2, site]:.3f}"
    assert text(page, "kept") == f"{int((keep > 0.5).sum())} of {len(keep)}"
    assert text(page, "verdict") == ("same prediction" if squad.kept_prediction[2, site] else "prediction changed")
    assert squad.site_names[site] in page.find_element("id", "slider").get_attribute("aria-valuetext")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_more_is_always_drawn_stronger(squad: Attributions, opened: Open, theme: str) -> None:
    page = opened(squad[:1], theme)
    move_to(page, 7)
    drawn = sorted((float(t["title"].split()[1]), luminance(t["back"])) for t in tokens(page))
    # a value is drawn as thousandths, of which the last may be one off at the threshold
    assert [p for p, _ in drawn] == pytest.approx(sorted(squad[0].keep[:, 7].tolist()), abs=0.001)
    order = [light for _, light in drawn] if theme == "dark" else [-light for _, light in drawn]
    assert order == sorted(order) and order[-1] - order[0] > 0.4


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_token_can_be_read_at_every_site(squad: Attributions, opened: Open, theme: str) -> None:
    page = opened(squad[:1], theme)
    for site in range(14):
        move_to(page, site)
        assert min(contrast(t["ink"], t["back"]) for t in tokens(page)) >= 4.5  # WCAG 2.2, 1.4.3


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_other_writing_can_be_read_too(squad: Attributions, opened: Open, theme: str) -> None:
    page = opened(squad, theme)
    colours = page.execute_script("""
        const card = getComputedStyle(document.querySelector('.card')).backgroundColor;
        const body = getComputedStyle(document.documentElement).backgroundColor;
        return [...document.querySelectorAll('.soft, dt, dd, summary, td, th, .verdict, h2, #site')].map(
            e => [e.textContent, getComputedStyle(e).color, e.closest('.card') ? card : body])""")
    assert {what: contrast(ink, back) for what, ink, back in colours if contrast(ink, back) < 4.5} == {}


def test_the_theme_can_change_while_the_page_is_open(squad: Attributions, opened: Open) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    page = opened(squad)
    before = tokens(page)[3]["back"]
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    # the browser tells the page in its own time
    WebDriverWait(page, 5).until(lambda _: luminance(tokens(page)[3]["back"]) < 0.1 < luminance(before))


def test_the_site_can_be_changed_by_keyboard(squad: Attributions, opened: Open) -> None:
    from selenium.webdriver import ActionChains, Keys

    page = opened(squad)
    ActionChains(page).send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    assert text(page, "site") == "13 · last"
    ActionChains(page).send_keys(Keys.ARROW_LEFT).perform()
    assert text(page, "site") == "12 · layer 11"
    press(page, "slider", Keys.ARROW_LEFT)  # the slider has the focus: one step, not two
    assert text(page, "site") == "11 · layer 10"
    press(page, "slider", Keys.HOME)
    assert text(page, "site") == "0 · embedding"


def test_arrows_in_the_search_field_move_the_cursor_only(squad: Attributions, opened: Open) -> None:
    from selenium.webdriver import Keys

    page = opened(squad)
    press(page, "search", "a", Keys.ARROW_LEFT)
    assert text(page, "site") == "13 · last"


def test_the_picker_steps_through_the_texts(sst: Attributions, opened: Open) -> None:
    from selenium.webdriver import Keys

    page = opened(sst)
    assert text(page, "count") == "Text 1 of 4"
    assert not page.find_element("id", "previous").is_enabled()
    page.find_element("id", "next").click()
    assert text(page, "original") == "negative"
    press(page, "list", Keys.END)
    assert text(page, "count") == "Text 4 of 4" and not page.find_element("id", "next").is_enabled()
    press(page, "list", Keys.ARROW_UP)
    assert text(page, "original") == "very negative"
    page.find_element("id", "text-0").click()
    assert text(page, "original") == "very positive"
    assert page.find_element("id", "list").get_attribute("aria-activedescendant") == "text-0"


def test_search_finds_words_joined_from_pieces(sst: Attributions, opened: Open) -> None:
    page = opened(sst)
    press(page, "search", "UNFUNCTIONAL")
    listed = [option.is_displayed() for option in page.find_elements("css selector", "#list li")]
    assert listed == [False, False, True, False]
    assert text(page, "count") == "1 of 4 texts match"
    page.find_element("id", "next").click()
    assert "unfunctional mess" in text(page, "tokens")


def test_a_token_stays_text_whatever_it_says(sst: Attributions, opened: Open) -> None:
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    sst.tokens[0][1] = sst.original[0] = sst.masked[0][0] = hostile
    sst.meta[hostile] = hostile
    page = opened(sst, title="safe")
    move_to(page, 0)
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    token = tokens(page)[1]
    assert token["text"] == hostile and token["children"] == 0
    assert text(page, "original") == text(page, "masked") == hostile
    assert hostile in text(page, "meta") and hostile in text(page, "numbers")
    assert page.find_elements("tag name", "img") == []
    assert page.title == "safe"


def test_the_policy_stops_markup_that_got_in_after_all(sst: Attributions, opened: Open, driver: Any) -> None:
    page = opened(sst, title="safe")
    page.execute_script("""const e = document.createElement('button');
        e.setAttribute('onclick', "document.title='owned'");
        document.body.append(e);
        e.click()""")
    assert page.title == "safe"
    assert "Content Security Policy" in driver.get_log("browser")[0]["message"]  # and so the log is empty again


def test_pointing_at_a_token_shows_its_own_bars(squad: Attributions, opened: Open) -> None:
    from selenium.webdriver import ActionChains

    page = opened(squad)
    ActionChains(page).move_to_element(page.find_elements("css selector", ".token")[5]).perform()
    heights = page.execute_script(
        "return [...document.querySelectorAll('#strip i')].map(i => parseFloat(i.style.height))"
    )
    # one thousandth by rounding, in per cent
    assert heights == pytest.approx((100 * squad[0].keep[5]).tolist(), abs=0.11)


def test_averages_are_split_where_there_are_two_segments(squad: Attributions, opened: Open) -> None:
    page = opened(squad)
    move_to(page, 7)
    for segment, name in ((None, "all tokens"), (1, "question"), (2, "passage")):
        assert f"{name}{squad.mean_keep(segment)[7]:.3f}" in text(page, "readout")
    assert len(page.find_elements("css selector", "#chart svg > g")) == 3


def test_averages_of_single_texts_are_one_curve(sst: Attributions, opened: Open) -> None:
    page = opened(sst)
    assert len(page.find_elements("css selector", "#chart svg > g")) == 1
    assert "question" not in text(page, "tokens") + text(page, "readout")


def test_one_text_needs_no_picker(sst: Attributions, opened: Open) -> None:
    page = opened(sst[:1])
    assert not page.find_element("id", "picker").is_displayed()
    assert page.find_element("id", "slider").is_displayed()


def test_of_a_thousand_texts_only_one_is_drawn(sst: Attributions, opened: Open) -> None:
    page = opened(repeated(sst, 250))
    assert len(tokens(page)) == len(sst.tokens[0])
    press(page, "search", "hostile")
    assert text(page, "count") == "250 of 1,000 texts match"


def test_a_narrow_window_does_not_scroll_sideways(squad: Attributions, opened: Open) -> None:
    page = opened(squad)
    metrics = {"width": 340, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= 340
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
