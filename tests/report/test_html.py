import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from typing import Any

import pytest

from vllm_deterministic.report import html
from vllm_deterministic.report import json as run_json
from vllm_deterministic.report.pair import Pair
from vllm_deterministic.report.partings import parting

from .conftest import Recorded


class _Balance(HTMLParser):
    """Check that every element is closed in turn, and collect what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in ("meta", "wbr"):
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
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; ")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    allowed = re.findall(r"'sha256-([^']*)'", policy)
    assert allowed == [b64encode(sha256(script.encode()).digest()).decode() for script in scripts]
    assert not re.search(r"@import|url\(", _without_scripts(page))


def _without_scripts(page: str) -> str:
    return re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)


def _figures(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    figures: dict[str, Any] = json.loads(text)
    return figures


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
    assert "candidates at token 8" in page
    assert "logprob gap 0.125" in page
    assert "Beside mixed-" in page
    assert page.count('class="chosen"') == 2


async def test_a_column_a_compared_answer_rises_to_where_it_parts(recorded: Recorded) -> None:
    record = await recorded(
        swap_token_of=lambda incoming: incoming.number == 5,
        vary_logprob_beyond=4,
        settings={"arms": ["identical"], "max_concurrency": 4},
    )
    assert record.arm("identical").divergent == 1
    picture = _figures(html.render(record))["parts-identical"]
    same, other, gaps = picture["data"]
    assert (same["name"], other["name"]) == ("same bytes", "other tokens")
    assert same["x"] == list(range(1, 13))
    assert sorted(same["y"]) == [8, *[16] * 11]
    assert [a + b for a, b in zip(same["y"], other["y"], strict=True)] == [16] * 12
    assert gaps["y"] == [0.125]
    assert same["customdata"][same["y"].index(8)] == [
        record.arm("identical").groups[0].variants[1].requests[0].id,
        "parts at token 8: &#x27;token_id:2402&#x27; became &#x27;token_id:2403&#x27;, logprob gap 0.125",
    ]


async def test_a_column_of_several_answers_shows_the_first_to_part(recorded: Recorded) -> None:
    settings = {"arms": ["identical"], "num_prompts": 1201, "max_concurrency": 1}
    record = await recorded(
        swap_token_of=lambda incoming: incoming.number == 5,
        latency_s=0,
        logprobs=False,
        settings=settings | {"logprobs": 0},
    )
    picture = _figures(html.render(record))["parts-identical"]
    same = picture["data"][0]
    assert same["x"] == list(range(1, 1202, 3))
    assert [place for place, height in zip(same["x"], same["y"], strict=True) if height == 8] == [4]
    assert "A column is 3 answers and shows the first to part" in html.render(record)


async def test_variants_that_the_record_does_not_spell_out_are_drawn_and_named(recorded: Recorded) -> None:
    settings = {"arms": ["identical"], "num_prompts": 130, "extra_body": {"temperature": 1.0}}
    record = await recorded(unstable_seeds=True, settings=settings)
    (group,) = record.arm("identical").groups
    assert [len(variant.choices) for variant in group.variants] == [1] * 100 + [0] * 30
    assert all(variant.difference is not None for variant in group.variants[1:])
    assert len({variant.output_digest for variant in group.variants}) == 130
    page = html.render(record)
    _check(page)
    assert _figures(page)["parts-identical"]["data"][0]["x"] == list(range(1, 131))
    assert parting(group, group.variants[129]).candidates == []
    assert parting(group, group.variants[129]).shared == ""


async def test_the_latency_is_drawn_from_zero_to_all_answers(recorded: Recorded) -> None:
    record = await recorded()
    picture = _figures(html.render(record))["latency"]
    assert [curve["name"] for curve in picture["data"]] == ["identical", "mixed", "prefix", "sampled"]
    for curve, arm in zip(picture["data"], record.arms, strict=True):
        assert arm.latency is not None
        assert (curve["x"][0], curve["y"][0]) == (0, 0)
        assert curve["y"][-1] == 100
        assert curve["x"][-1] == pytest.approx(arm.latency.max, abs=2e-6)
        assert curve["x"] == sorted(curve["x"])


async def test_what_servers_and_users_say_is_escaped(recorded: Recorded) -> None:
    bad = "</script><script>alert(1)</script>"
    record = await recorded(swap_token_beyond=3, settings={"arms": ["mixed"], "metadata": {"note": bad}})
    record = run_json.load(run_json.render(record).replace("token_id:", bad).replace(" w", bad))
    page = html.render(record)
    _check(page)
    assert "<script" not in _without_scripts(page)
    assert "&lt;script&gt;" in page
    sentences = [sentence for _, sentence in _figures(page)["parts-mixed"]["data"][0]["customdata"]]
    assert any("token 8: &#x27;&lt;/script" in sentence for sentence in sentences)


async def test_two_runs_stand_side_by_side(recorded: Recorded) -> None:
    settings = {"arms": ["identical", "mixed"]}
    faulty = await recorded(swap_token_beyond=3, settings=settings, fingerprints=("fp-1",))
    pair = Pair(faulty, await recorded(settings=settings), ("default", "deterministic"))
    page = html.render_pair(pair)
    _check(page)
    assert "<h1>Diverged</h1>" in page
    assert "<h1>Identical</h1>" in page
    assert "<tr><td>system fingerprint</td>" in page
    assert "these runs do not share one" in page
    assert _figures(page).keys() >= {"parts-mixed-0", "parts-mixed-1", "latency-mixed"}


async def test_a_run_that_never_began_stands_beside_another(recorded: Recorded) -> None:
    page = html.render_pair(Pair(await recorded(logprobs=False), await recorded(), ("a", "b")))
    _check(page)
    assert "<h1>Could not run to the end</h1>" in page
    assert "have no request in common" in page
