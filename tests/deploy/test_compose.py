"""The compose file and the images it builds."""

import os
import re
import shutil
import subprocess
from typing import Any

import pytest

from .conftest import DEPLOY

ROOT = DEPLOY.parent
SET = {"MODEL": "m", "VLLM_DETERMINISTIC_TOKEN": "0123456789abcdef", "GRAFANA_PASSWORD": "p"}


def docker_compose() -> list[str]:
    """The command that reads compose files, where this machine has one."""
    plugin = ["docker", "compose"]
    if shutil.which("docker") and subprocess.run([*plugin, "version"], capture_output=True).returncode == 0:
        return plugin
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    pytest.skip("no docker compose")


def test_docker_compose_takes_it() -> None:
    command = [
        *docker_compose(),
        "--file",
        str(DEPLOY / "compose.yaml"),
        "--profile",
        "gpu",
        "--profile",
        "cpu",
        "config",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | SET)
    assert done.returncode == 0, done.stderr
    missing = {name: value for name, value in os.environ.items() if name not in SET}
    refused = subprocess.run(command, capture_output=True, text=True, env=missing | {"MODEL": "m"})
    assert refused.returncode != 0
    assert "set VLLM_DETERMINISTIC_TOKEN" in refused.stderr


def test_what_it_names_is_there(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert set(service.get("networks", {})) <= {"default"}
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (DEPLOY / source).is_file() if source.startswith(".") else source in compose["volumes"], mount
        if build := service.get("build"):
            assert (DEPLOY / build["context"]).resolve() == ROOT
            assert (ROOT / build["dockerfile"]).is_file()


def test_images_are_pinned_and_ports_are_for_this_machine_alone(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name


@pytest.mark.parametrize("image", ["service", "server", "server-cpu"])
def test_an_image_is_built_from_what_is_there(image: str) -> None:
    file = DEPLOY / "docker" / f"Dockerfile.{image}"
    lines = file.read_text().replace("\\\n", " ").splitlines()
    for base in (line.split()[1] for line in lines if line.startswith("FROM")):
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", base), base
    allowed = {
        line[1:] for line in file.with_name(f"{file.name}.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    for line in lines:
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert source in allowed, source


def test_the_service_runs_as_nobody_in_particular() -> None:
    text = (DEPLOY / "docker" / "Dockerfile.service").read_text()
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text
