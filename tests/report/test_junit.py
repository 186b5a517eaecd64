import string
from xml.etree import ElementTree as ET

import pytest

from vllm_deterministic.report import json, junit

from .conftest import Recorded


def _cases(suite: ET.Element) -> dict[str, str]:
    """What became of each test case: its child, or "passed"."""
    cases = suite.findall("testcase")
    assert all(len(case) <= 1 for case in cases)
    return {case.attrib["name"]: case[0].tag if len(case) else "passed" for case in cases}


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({}, {"identical": "passed", "mixed": "passed", "prefix": "passed", "sampled": "passed"}),
        (
            {"swap_token_on_cache_hit": True},
            {"identical": "passed", "mixed": "failure", "prefix": "failure", "sampled": "failure"},
        ),
        (
            {"status_after": (14, 500)},
            {"identical": "passed", "mixed": "error", "prefix": "skipped", "sampled": "skipped"},
        ),
        (
            {"logprobs": False},
            {"identical": "skipped", "mixed": "skipped", "prefix": "skipped", "sampled": "skipped", "run": "error"},
        ),
        (
            {"status_after": (9, 500), "swap_token_of": lambda incoming: incoming.number == 5},
            {"identical": "failure", "mixed": "skipped", "prefix": "skipped", "sampled": "skipped", "run": "error"},
        ),
    ],
)
async def test_each_arm_is_a_case_and_the_counts_are_theirs(
    recorded: Recorded, faults: dict[str, object], expected: dict[str, str]
) -> None:
    record = await recorded(settings={"max_concurrency": 2}, **faults)
    root = ET.fromstring(junit.render(record))
    (suite,) = root.findall("testsuite")
    assert _cases(suite) == expected
    outcomes = list(expected.values())
    for element in (root, suite):
        assert int(element.attrib["tests"]) == len(expected)
        for count, outcome in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(element.attrib[count]) == outcomes.count(outcome)
    assert suite.attrib["timestamp"] == record.started_at.strftime("%Y-%m-%dT%H:%M:%S")
    assert (record.exit_code == 0) == (set(outcomes) == {"passed"})


async def test_a_failure_tells_where_and_the_suite_how_to_repeat(recorded: Recorded) -> None:
    record = await recorded(swap_token_beyond=3, settings={"arms": ["mixed"]})
    suite = ET.fromstring(junit.render(record))[0]
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert failure.attrib["type"] == "outputs_differ"
    assert "got different outputs" in failure.attrib["message"]
    assert "part at token 8" in (failure.text or "")
    properties = {p.attrib["name"]: p.attrib["value"] for p in suite.iterfind("properties/property")}
    assert properties["command"] == record.command
    assert properties["system fingerprint"] == "fp-0"
    assert "Verdict: diverged." in (suite.findtext("system-out") or "")


async def test_whatever_a_token_holds_the_xml_is_well_formed(recorded: Recorded) -> None:
    record = await recorded(swap_token_beyond=3, settings={"arms": ["mixed"], "metadata": {"nul": "a\0b\ufffe"}})
    bad = "".join(chr(code) for code in (*range(32), 0xFFFE, 0x1F600)) + string.punctuation
    text = json.render(record).replace(
        "token_id:", bad.translate({ord(c): f"\\u{ord(c):04x}" for c in bad[:32] + '"\\'})
    )
    root = ET.fromstring(junit.render(json.load(text)))
    values = {p.attrib["name"]: p.attrib["value"] for p in root.iter("property")}
    assert values["nul"] == "a\ufffdb\ufffd"
    assert "\U0001f600" in (root.findtext("testsuite/system-out") or "")
