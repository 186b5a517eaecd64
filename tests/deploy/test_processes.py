"""What the manifests start, started here with the same arguments."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ..service.conftest import Process
from ..verify.fake_server import FakeServer
from .conftest import DEPLOY


def arguments(source: str, compose: dict[str, Any]) -> list[str]:
    """Of the verification service."""
    if source == "compose":
        words: list[str] = compose["services"]["service"]["command"]
        return words
    for manifest in yaml.safe_load_all((DEPLOY / "kubernetes" / f"{source}.yaml").read_text()):
        if manifest["kind"] == "Deployment":
            (container,) = manifest["spec"]["template"]["spec"]["containers"]
            found: list[str] = container["args"]
            return found
    raise KeyError(source)


@pytest.mark.parametrize("source", ["compose", "gpu"])
def test_the_service_starts_and_verifies(source: str, compose: dict[str, Any], tmp_path: Path) -> None:
    words = arguments(source, compose)
    with FakeServer().listen() as url:
        # Names, ports and paths of the cluster are not here; all else stays.
        here = [f"{word.partition('=')[0]}={url}" if "=http://" in word else word for word in words]
        for option, value in (("--database", str(tmp_path / "runs.db")), ("--port", "0")):
            if option in here:
                here[here.index(option) + 1] = value
        with Process(tmp_path / "runs.db", *here) as service:
            service.wait(lambda: service.client.get("/ready").is_success)
            service.wait(lambda: service.client.get("/v1/verifications?status=identical").json()["items"] != [])
            (done,) = service.client.get("/v1/verifications").json()["items"]
            assert (done["trigger"], len(done["targets"])) == ("schedule", words.count("--target"))
