"""What stands under deploy/, read once."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "vllm-deterministic"
TOKEN = {"service": {"token": {"existingSecret": "the-token"}}}


@pytest.fixture(scope="session")
def render() -> ModuleType:
    """deploy/kubernetes/render.py."""
    spec = importlib.util.spec_from_file_location("render", DEPLOY / "kubernetes" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    """deploy/compose.yaml."""
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return content


@pytest.fixture(scope="session")
def rules() -> list[dict[str, Any]]:
    """The alerts."""
    groups = yaml.safe_load((CHART / "files" / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="session")
def dashboard() -> dict[str, Any]:
    """Grafana's dashboard."""
    content: dict[str, Any] = json.loads((CHART / "files" / "dashboard.json").read_text())
    return content
