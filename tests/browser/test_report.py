"""The HTML reports as a reader sees them: drawn, legible, inside their window, deaf to the network."""

import asyncio
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from vllm_deterministic.report import html
from vllm_deterministic.report.pair import Pair
from vllm_deterministic.verify.record import RunRecord
from vllm_deterministic.verify.run import verify
from vllm_deterministic.verify.settings import Settings

from ..verify.fake_server import FakeServer
from .conftest import DESKTOP, PHONE, Browser

_SHOWINGS = [(DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light"), (PHONE, "dark")]
_ATTACK = "</script><script>document.title = 'attacked'</script><img src=x onerror=\"document.title = 'attacked'\">"


def _record(**faults: Any) -> RunRecord:
    given = {"base_url": "http://fake", "num_prompts": 40, "mixed_prompts": 12, "sampled_prompts": 48}
    settings = Settings.model_validate({**given, "kv_split": 64, "chunk_budget": 128, "metadata": {"note": _ATTACK}})
    return asyncio.run(verify(settings, transport=FakeServer(**faults).transport()))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """URLs of reports of every shape."""
    faulty = _record(swap_token_of=lambda incoming: incoming.number % 9 == 4, vary_logprob_beyond=20)
    pure, broken, never = _record(), _record(status_after=(60, 500)), _record(logprobs=False)
    rendered = {
        "diverged": html.render(faulty),
        "identical": html.render(pure),
        "error": html.render(broken),
        "never": html.render(never),
        "pair": html.render_pair(Pair(faulty, pure, ("default", "runs/of-2026-11-22/a-name-without-an-end.json"))),
    }
    folder = tmp_path_factory.mktemp("pages")
    urls = {}
    for name, page in rendered.items():
        path = folder / f"{name}.html"
        path.write_text(page, encoding="utf-8")
        urls[name] = path.as_uri()
    return urls


def _drawn(browser: Browser, selector: str) -> int:
    return len(browser.driver.find_elements(By.CSS_SELECTOR, selector))


@pytest.mark.parametrize("page", ["diverged", "identical", "error", "never", "pair"])
@pytest.mark.parametrize(("size", "scheme"), _SHOWINGS)
def test_a_page_fits_its_window_and_can_be_read(
    browser: Browser, pages: dict[str, str], page: str, size: tuple[int, int], scheme: str
) -> None:
    browser.open(pages[page], size=size, scheme=scheme)
    browser.driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert browser.overflow() == 0
    assert browser.contrast("h1, h2, h3, p, dt, dd, th, td, li, summary, strong, span, code, pre, mark") >= 4.5
    if page != "never":
        assert browser.contrast(".js-plotly-plot text") >= 4.5
    assert browser.complaints() == []


@pytest.mark.parametrize("page", ["diverged", "pair", "never"])
def test_a_page_asks_nobody_and_runs_no_script_but_its_own(browser: Browser, pages: dict[str, str], page: str) -> None:
    browser.open(pages[page])
    assert browser.driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert browser.driver.title != "attacked"
    if page != "pair":
        assert _ATTACK in browser.driver.find_element(By.TAG_NAME, "body").text
    refused = "try { await fetch('http://127.0.0.1:9/'); return 'asked' } catch (error) { return 'refused' }"
    assert browser.driver.execute_script(refused) == "refused"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints())


def test_the_pictures_are_drawn(browser: Browser, pages: dict[str, str]) -> None:
    browser.open(pages["diverged"])
    assert _drawn(browser, "#parts-identical .bars .point") >= 40
    assert _drawn(browser, "#parts-identical .scatterlayer .point") >= 4
    assert _drawn(browser, "#latency .scatterlayer .lines path") == 4
    browser.open(pages["pair"])
    assert _drawn(browser, "#parts-mixed-0 .bars .point") >= 12
    assert _drawn(browser, "#parts-mixed-1 .bars .point") >= 12
    assert _drawn(browser, "#latency-mixed .scatterlayer .lines path") == 2


def test_a_column_tells_its_request_under_the_mouse(browser: Browser, pages: dict[str, str]) -> None:
    browser.open(pages["diverged"])
    column = browser.driver.find_elements(By.CSS_SELECTOR, "#parts-identical .bars .point")[4]
    browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", column)
    ActionChains(browser.driver).move_to_element(column).pause(0.3).perform()
    told = browser.driver.find_element(By.CSS_SELECTOR, "#parts-identical .hoverlayer").text
    assert "identical-" in told


def test_pictures_follow_a_change_from_light_to_dark(browser: Browser, pages: dict[str, str]) -> None:
    browser.open(pages["diverged"], scheme="light")
    ink = "return getComputedStyle(document.querySelector('#latency text')).fill"
    light = browser.driver.execute_script(ink)
    browser.prefer("dark")
    # The page hears of it a moment later.
    WebDriverWait(browser.driver, 20, poll_frequency=0.05).until(lambda driver: driver.execute_script(ink) != light)
    assert browser.contrast(".js-plotly-plot text") >= 4.5


@pytest.mark.parametrize("page", ["diverged", "pair"])
def test_a_page_follows_the_width_of_its_window(browser: Browser, pages: dict[str, str], page: str) -> None:
    browser.open(pages[page], size=DESKTOP)
    for width in (800, 600, 420, 320):
        browser.resize((width, 800))
        browser.driver.execute_async_script("setTimeout(arguments[0], 500)")
        assert browser.overflow() == 0, width
