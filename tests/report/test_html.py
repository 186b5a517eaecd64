import re
from html.parser import HTMLParser

import pytest

from vllm_deterministic.report import html

from .conftest import Recorded


class _Balance(HTMLParser):
    """Check that every element is closed in turn, and collect what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value for name, value in attrs if name in ("src", "href") and value]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _check(page: str) -> None:
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []
    assert parser.loads == []
    assert not re.search(r"<script|@import|url\(", page)


@pytest.mark.parametrize(
    ("faults", "heading"),
    [
        ({}, "Identical"),
        ({"swap_token_beyond": 3, "swap_token_on_cache_hit": True}, "Diverged"),
        ({"vary_logprob_beyond": 3}, "Diverged"),
        ({"ignore_seeds": True}, "Diverged"),
        ({"status_after": (8, 500)}, "Could not run to the end"),
        ({"logprobs": False}, "Could not run to the end"),
        ({"token_ids": False, "metrics": False, "swap_token_beyond": 3}, "Diverged"),
    ],
)
async def test_the_page_is_whole_and_loads_nothing(recorded: Recorded, faults: dict[str, object], heading: str) -> None:
    page = html.render(await recorded(**faults))
    _check(page)
    assert f"<h1>{heading}</h1>" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "vllm-deterministic verify --base-url http://fake" in page


async def test_it_shows_where_outputs_part_and_the_gap(recorded: Recorded) -> None:
    page = html.render(await recorded(swap_token_beyond=3, settings={"arms": ["mixed"]}))
    assert "Where mixed parts" in page
    assert "candidate at token 8" in page
    assert "logprob gap 0.125" in page
    assert "Beside mixed-" in page
    assert ">reference<" in page
    assert ">other<" in page


async def test_what_servers_and_users_say_is_escaped(recorded: Recorded) -> None:
    page = html.render(
        await recorded(settings={"arms": ["identical"], "metadata": {"note": "<script>alert(1)</script>"}})
    )
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
