"""Render the chart's profiles as the plain manifests in this folder, for clusters without Helm.

    python deploy/kubernetes/render.py

The same as `helm template vllm-deterministic deploy/helm/vllm-deterministic --values ...`, less Helm's own label.
"""

from pathlib import Path
from typing import Any

import helm_python
import yaml

FOLDER = Path(__file__).parent
CHART = FOLDER.parent / "helm" / "vllm-deterministic"
PROFILES = ("cpu", "gpu")
SECRET = "vllm-deterministic"
_HEAD = """\
# The {profile} profile of deploy/helm/vllm-deterministic, rendered by deploy/kubernetes/render.py: change it there.
#
#   kubectl create secret generic {secret} --from-literal=token=$(openssl rand -hex 32)
#   kubectl apply -f deploy/kubernetes/{profile}.yaml
"""


def render(profile: str) -> str:
    """The manifests of a profile, as one YAML file."""
    values = yaml.safe_load((CHART / f"values-{profile}.yaml").read_text())
    values["service"] = {"token": {"existingSecret": SECRET}}
    files = template(values)
    manifests = [files[name].strip().removesuffix("---").strip() for name in sorted(files) if files[name].strip()]
    text = _HEAD.format(profile=profile, secret=SECRET) + "".join(f"---\n{manifest}\n" for manifest in manifests)
    return "".join(line for line in text.splitlines(keepends=True) if "managed-by: Helm" not in line)


def template(values: dict[str, Any], name: str = "vllm-deterministic") -> dict[str, str]:
    """What Helm makes of the chart's templates, by file. Raises helm_python.HelmError where it refuses the values."""
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name=name, namespace="default")
    return {file: text for file, text in files.items() if file.endswith(".yaml")}


if __name__ == "__main__":
    for profile in PROFILES:
        (FOLDER / f"{profile}.yaml").write_text(render(profile))
