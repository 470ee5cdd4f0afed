"""The isolation report in headless Chromium: it is read on a phone, on paper, in either scheme, and asks nobody for anything."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.chrome.webdriver import WebDriver

from loadtests.report import html
from tests.integration.browsing import FAINT_TEXTS, chromium, sized
from tests.unit.loadtests.made_reports import report_of

pytestmark = [pytest.mark.timeout(180), pytest.mark.browser]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with chromium(tmp_path_factory.mktemp("chromium")) as one:
        yield one


@pytest.fixture
def page(browser: WebDriver, tmp_path: Path) -> WebDriver:
    path = tmp_path / "report.html"
    path.write_text(html.render(report_of()), encoding="utf-8")
    sized(browser, 1280)
    browser.get_log("browser")
    browser.get(path.as_uri())
    return browser


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_read_at_every_width_and_in_either_scheme(page: WebDriver, width: int, scheme: str) -> None:
    sized(page, width, scheme)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.execute_script(FAINT_TEXTS) == []


def test_the_verdict_is_seen_without_scrolling_on_a_phone(page: WebDriver) -> None:
    sized(page, 360)
    (verdict,) = page.find_elements("class name", "verdict")
    assert verdict.rect["y"] < 740
    assert verdict.text


def test_every_plot_is_drawn(page: WebDriver) -> None:
    plots = page.find_elements("css selector", "svg")
    assert len(plots) >= 2
    assert all(plot.rect["width"] > 100 and plot.rect["height"] > 50 for plot in plots)


def test_nothing_is_asked_for_and_nothing_goes_wrong(page: WebDriver) -> None:
    assert page.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)") == []
    assert page.get_log("browser") == []


def test_it_prints(page: WebDriver) -> None:
    printed = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
