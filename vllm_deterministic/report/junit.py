"""The run record as JUnit XML, for a pipeline: one test suite a run, one test case an arm.

The form is the one that Jenkins, GitLab, GitHub's test reporters and Azure Pipelines share: testsuites, testsuite with
its counts, properties, testcase with at most one failure, error or skipped, and system-out.
"""

import re
from xml.etree import ElementTree as ET

from vllm_deterministic.report import console
from vllm_deterministic.report.partings import describe, different
from vllm_deterministic.report.view import RunView
from vllm_deterministic.verify.record import ArmRecord, RunRecord

_SHOWN = 20  # variants a failure spells out
_CLASS = "vllm-deterministic.verify"
# XML 1.0 has no place for these, not even escaped; a token may hold any.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(record: RunRecord) -> str:
    """An arm that diverged is a failure, one that was cut short an error, one that was never sent is skipped.

    A run that could not begin is an error of the case "run".
    """
    cases = [_case(arm, record) for arm in record.arms]
    names = {arm.name for arm in record.arms}
    cases += [_skipped(name) for name in record.settings.get("arms", ()) if name not in names]
    if record.exit_code == 2 and not any(arm.status == "incomplete" for arm in record.arms):
        cases.append(_error(_element("testcase", classname=_CLASS, name="run", time="0"), record))
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
        "skipped": str(sum(case.find("skipped") is not None for case in cases)),
        "time": f"{record.duration_s:.3f}",
    }
    name = f"vllm-deterministic verify {record.server.model or record.server.base_url}"
    suite = _element("testsuite", name=name, timestamp=record.started_at.strftime("%Y-%m-%dT%H:%M:%S"), **counts)
    properties = ET.SubElement(suite, "properties")
    for key, value in [*RunView(record).environment, ("command", record.command)]:
        properties.append(_element("property", name=key, value=value))
    suite.extend(cases)
    ET.SubElement(suite, "system-out").text = _clean(console.render(record))
    root = _element("testsuites", name="vllm-deterministic", **counts)
    root.append(suite)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(arm: ArmRecord, record: RunRecord) -> ET.Element:
    case = _element("testcase", classname=_CLASS, name=arm.name, time=f"{arm.duration_s:.3f}")
    if arm.failures:
        message = "; ".join(failure.message for failure in arm.failures)
        failure = _element("failure", type=arm.failures[0].kind, message=message)
        variants = different(arm)
        lines = [describe(group, variant) for group, variant in variants[:_SHOWN]]
        lines += [f"and {len(variants) - _SHOWN} more variants"] if len(variants) > _SHOWN else []
        failure.text = _clean("\n".join(lines))
        case.append(failure)
    elif arm.status == "incomplete":
        _error(case, record)
    return case


def _error(case: ET.Element, record: RunRecord) -> ET.Element:
    case.append(_element("error", type=record.status, message=record.message))
    return case


def _skipped(name: str) -> ET.Element:
    case = _element("testcase", classname=_CLASS, name=name, time="0")
    case.append(_element("skipped", message="the run ended before this arm"))
    return case


def _element(tag: str, **attributes: str) -> ET.Element:
    return ET.Element(tag, {name: _clean(value) for name, value in attributes.items()})


def _clean(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)
