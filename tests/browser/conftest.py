"""Pages in a real Chromium, headless. `make test-browser` installs it from Debian's packages."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

DESKTOP, PHONE = (1280, 900), (360, 740)  # CSS pixels


class Browser:
    """One window."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, url: str, *, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        """Load a page at a window's size, for a reader who prefers light or dark."""
        self.driver.get_log("browser")  # forget what earlier pages said
        self.resize(size)
        self.prefer(scheme)
        self.driver.get(url)

    def resize(self, size: tuple[int, int]) -> None:
        """Give the page so many CSS pixels; a narrow one is a phone's, with a finger on it."""
        width, height = size
        phone = width <= PHONE[0]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})

    def prefer(self, scheme: str) -> None:
        """Prefer light or dark from now on."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self) -> list[str]:
        """What the console says of scripts, policy and network since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def overflow(self) -> int:
        """CSS pixels by which the page is wider than its window."""
        return int(
            self.driver.execute_script(
                "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
        )

    def contrast(self, selector: str) -> float:
        """The lowest WCAG contrast ratio of visible text in the elements selected, against the nearest background."""
        return float(self.driver.execute_script(_CONTRAST, selector))


_CONTRAST = """
const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const parse = text => text.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
function background(element) {
  for (; element; element = element.parentElement) {
    const color = parse(getComputedStyle(element).backgroundColor);
    if (color.length < 4 || color[3] > 0) return color;
  }
  return [255, 255, 255];
}
const ratios = [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length).map(element => {
  const style = getComputedStyle(element);
  const ink = parse(element instanceof SVGElement ? style.fill : style.color);
  const [low, high] = [luminance(ink), luminance(background(element))].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
});
if (!ratios.length) throw new Error("nothing is visible at " + arguments[0]);
return Math.min(...ratios);
"""


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """A Chromium that speaks to nobody but the pages it is given."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no chromium with chromedriver: `make test-browser` installs both")
    options = ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless",
        "--no-sandbox",  # root, as in most containers, gets no sandbox
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(executable_path=chromedriver))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def browser(driver: Chrome) -> Browser:
    """The window, as every test of a page wants it."""
    return Browser(driver)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this directory."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
