"""Alerts and the dashboard speak of metrics that the service has, and Prometheus takes them."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_deterministic.service.metrics import Metrics

from .conftest import CHART, DEPLOY


@pytest.fixture
def known() -> set[str]:
    """Names of all samples that the service may tell."""
    page = Metrics(["a"]).page().decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE))
    suffixes = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {name + suffix for name, kind in kinds.items() for suffix in suffixes[kind]}


def test_alerts_and_panels_ask_for_metrics_that_there_are(
    known: set[str], rules: list[dict[str, Any]], dashboard: dict[str, Any]
) -> None:
    expressions = [rule["expr"] for rule in rules]
    expressions += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 10
    for expression in expressions:
        asked = set(re.findall(r"vllm_deterministic_\w+", expression))
        assert asked, expression
        assert asked <= known, expression


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_prometheus_takes_the_rules_and_they_fire_when_they_should(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool (Debian's package prometheus has it)")
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["rule_files"] = [str(CHART / "files" / "rules.yml")]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    for command in (
        ["check", "config", str(tmp_path / "prometheus.yml")],
        ["check", "rules", str(CHART / "files" / "rules.yml")],
        ["test", "rules", str(DEPLOY / "prometheus" / "rules_test.yml")],
    ):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
