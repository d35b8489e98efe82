import os

import pytest
from browser import EXECUTABLE, Browser

from ultrathink_model.reporting import write_report
from ultrathink_model.reporting.page import comparison_html, write_page

# CI installs it, and fails without.
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None and "CI" not in os.environ, reason="needs chromium (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def page(stages, tmp_path):
    return write_report(stages, tmp_path / "report.html", "Production")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (390, "dark")])
def test_page_opens_without_complaint_or_network(browser, page, width, scheme):
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(page, width=width, scheme=scheme)
    assert browser.complaints == []
    assert [address for address in browser.requests if not address.startswith(("file:", "data:"))] == []
    # Nothing sticks out of the window: wide tables scroll within their own frame.
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").split(",")[0])
    assert (red < 80) is (scheme == "dark")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_comparison_opens_without_complaint_or_network(browser, stages, tmp_path, width):
    page = write_page(comparison_html(stages[:2], "Two runs"), tmp_path / "compare.html")
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(page, width=width, scheme="dark")
    assert browser.complaints == []
    assert [address for address in browser.requests if not address.startswith(("file:", "data:"))] == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelectorAll('#comparison tbody tr').length") > 5
    curves = "[...document.querySelectorAll('.chart.wide path.faint')]"
    assert browser.evaluate(f"{curves}.filter(path => path.getBBox().width > 0).length") == 2


def test_every_chart_draws_its_curves_within_its_frame(browser, page):
    browser.open(page)
    charts = browser.evaluate(
        """[...document.querySelectorAll(".chart")].map(chart => ({
            title: chart.querySelector("figcaption strong").textContent,
            curves: [...chart.querySelectorAll("path.line, path.marked, path.area, path.dots")].filter(
                path => path.getBBox().width > 0).length,
            height: chart.querySelector("svg").getBoundingClientRect().height,
        }))"""
    )
    titles = {chart["title"] for chart in charts}
    assert {"Loss", "Learning rate", "Throughput", "Reasoning paths", "Reward", "Distance from the reference"} <= titles
    assert all(chart["curves"] >= 1 and chart["height"] > 100 for chart in charts)


def test_pointing_at_a_chart_shows_the_numbers_there(browser, page):
    browser.open(page)
    place = browser.evaluate(
        "(() => { const box = document.querySelector('.plot').getBoundingClientRect();"
        " return [box.left + box.width * 0.3, box.top + 40] })()"
    )
    tip = "document.querySelector('.plot .tip')"
    assert browser.evaluate(f"{tip}.hidden")
    browser.point_at(*place)
    text = browser.evaluate(f"{tip}.textContent")
    assert not browser.evaluate(f"{tip}.hidden")
    assert "tokens" in text
    assert "base, training" in text
    browser.point_at(1, 1)
    assert browser.evaluate(f"{tip}.hidden")


def test_what_a_model_wrote_cannot_run(browser, page):
    browser.open(page)
    assert browser.evaluate("window.harmed === undefined")
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    # Even markup that found its way into the page would not run: only the page's own script may.
    browser.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.harmed = 1'}))"
    )
    assert browser.evaluate("window.harmed === undefined")


def test_charts_need_no_script(browser, page):
    # ZenML's dashboard shows the page in a frame that may run none.
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        browser.point_at(400, 1100)
        assert browser.evaluate("[...document.querySelectorAll('.tip')].every(tip => tip.hidden)")
        curves = "[...document.querySelectorAll('path.line, path.marked')]"
        assert browser.evaluate(f"{curves}.every(path => path.getBBox().width > 0) && {curves}.length") > 10
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
