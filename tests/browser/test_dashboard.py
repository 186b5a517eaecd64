"""The service's page in a real browser: locked, verifying, after a verdict; light, dark, on a phone."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from ..service.conftest import TOKEN, Process
from ..verify.fake_server import FakeServer
from .conftest import DESKTOP, PHONE, Browser


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A service on one target that holds, one that does not, and one that is gone."""
    database = tmp_path_factory.mktemp("dashboard") / "runs.db"
    with (
        FakeServer().listen() as good,
        FakeServer(swap_token_beyond=2).listen() as bad,
        Process(database, *_targets(good=good, bad=bad, gone="http://127.0.0.1:9")) as process,
    ):
        yield process


def _targets(**urls: str) -> list[str]:
    return [word for name, url in urls.items() for word in ("--target", f"{name}={url}")]


def find(browser: Browser, selector: str) -> WebElement:
    return browser.driver.find_element(By.CSS_SELECTOR, selector)


def until(browser: Browser, met: Callable[[], bool]) -> None:
    # The page draws its lists anew whenever it hears something.
    ignored = (StaleElementReferenceException,)
    WebDriverWait(browser.driver, 20, poll_frequency=0.05, ignored_exceptions=ignored).until(lambda _: met())


def click(browser: Browser, xpath: str) -> None:
    """Click what is there once it is there."""

    def clicked() -> bool:
        browser.driver.find_element(By.XPATH, xpath).click()
        return True

    until(browser, clicked)


def each(browser: Browser, selector: str, expression: str) -> list[Any]:
    """The value of a JavaScript expression of every ``element``, all of one moment."""
    script = f"return [...document.querySelectorAll(arguments[0])].map(element => {expression})"
    values: list[Any] = browser.driver.execute_script(script, selector)
    return values


def open_page(browser: Browser, service: Process, *, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
    """The page, unlocked."""
    browser.open(f"{service.url}/health")
    browser.driver.execute_script("sessionStorage.setItem('token', arguments[0])", TOKEN)
    browser.open(service.url, size=size, scheme=scheme)
    until(browser, lambda: find(browser, "#content").is_displayed())


def test_it_asks_for_the_token_and_says_where_it_is_wrong(browser: Browser, service: Process) -> None:
    browser.open(service.url)
    browser.driver.execute_script("sessionStorage.clear()")
    browser.driver.refresh()
    until(browser, lambda: find(browser, "#login").is_displayed())
    assert not find(browser, "#content").is_displayed()
    for token, said in (("not the token at all", "The token is missing or wrong."), (TOKEN, "")):
        find(browser, "#token").send_keys(token)
        find(browser, "#login button").click()
        until(browser, lambda said=said: said in find(browser, "#subline").text)
    until(browser, lambda: find(browser, "#content").is_displayed())
    assert not find(browser, "#login").is_displayed()


def test_a_run_is_followed_live_to_its_verdict_and_its_report(browser: Browser, service: Process) -> None:
    open_page(browser, service)
    find(browser, "#verify").click()
    until(browser, lambda: find(browser, "#live").is_displayed())
    seen: set[int] = set()

    def some_progress() -> bool:
        seen.update(each(browser, "progress", "element.value"))
        return len(seen) > 4

    until(browser, some_progress)
    until(browser, lambda: find(browser, "h1").text == "Diverged: bad")
    assert "diverged" in browser.driver.title.lower()
    states = each(browser, ".target", "element.innerText")
    assert "identical," in states[0]
    assert "arms failed" in states[1]
    assert "Does not answer: Cannot connect" in states[2]
    last = ".target .strip i:last-child"
    assert each(browser, last, "element.className") == ["identical", "diverged", "error"]
    assert len(set(each(browser, last, "element.getBoundingClientRect().height"))) == 3  # told apart without colours
    until(browser, lambda: not find(browser, "#live").is_displayed())

    first = browser.driver.current_window_handle
    click(browser, "//button[text()='bad']")
    until(browser, lambda: len(browser.driver.window_handles) == 2)
    browser.driver.switch_to.window(next(one for one in browser.driver.window_handles if one != first))
    try:
        until(browser, lambda: "iverged" in find(browser, "h1").text)
        assert browser.complaints() == []
    finally:
        browser.driver.close()
        browser.driver.switch_to.window(first)


def test_a_run_is_cancelled_from_the_page(browser: Browser, service: Process) -> None:
    id = service.start(targets=["good"], num_prompts=1000)
    open_page(browser, service)
    until(browser, lambda: len(each(browser, "#running button", "1")) == 1)
    click(browser, "//*[@id='running']//button")
    service.wait(lambda: service.status(id) == "cancelled")
    until(browser, lambda: "cancelled" in find(browser, "#recent .run").text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_is_legible_and_inside_the_window(
    browser: Browser, service: Process, scheme: str, size: tuple[int, int]
) -> None:
    if not service.client.get("/v1/verifications?status=diverged").json()["items"]:
        id = service.start()
        service.wait(lambda: service.status(id) == "diverged")
    open_page(browser, service, size=size, scheme=scheme)
    until(browser, lambda: find(browser, "#recent .run").is_displayed())
    assert browser.overflow() <= 0
    assert browser.contrast("h1, h2, p, button, strong, .soft, .status, .wide") >= 4.5
    assert browser.complaints() == []


def test_a_service_that_is_gone_is_told(browser: Browser, service: Process) -> None:
    open_page(browser, service)
    browser.driver.execute_script("window.fetch = () => Promise.reject(new Error('no network'))")
    browser.driver.execute_script("document.dispatchEvent(new Event('visibilitychange'))")  # asks at once
    until(browser, lambda: find(browser, "h1").text == "The service does not answer")
