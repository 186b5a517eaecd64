"""The Helm chart, rendered by Helm itself, against Kubernetes' schemas and against what it promises."""

import copy
from types import ModuleType
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from .conftest import CHART, DEPLOY, TOKEN

OPERATOR = {"ServiceMonitor", "PrometheusRule"}  # not Kubernetes' own kinds
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "deployment": {"server": {"kind": "Deployment", "replicas": 3}},
    "sidecar": {"service": {"mode": "sidecar"}},
    "elsewhere": {"server": {"enabled": False}, "service": {"targets": ["a=http://model.example:8000"]}},
    "no service": {"service": {"enabled": False}},
    "everything": {
        "server": {
            "apiKey": {"existingSecret": "key"},
            "huggingFaceToken": {"existingSecret": "hub"},
            "modelClaim": "models",
            "model": "/models/mine",
            "extraArgs": ["--max-model-len", "4096"],
            "nodeSelector": {"kind": "h200"},
            "podSecurityContext": {"fsGroup": 1},
        },
        "service": {"extraArgs": ["--keep-days", "7"], "persistence": {"storageClass": "fast"}},
        "networkPolicy": {"serviceEgress": [{"ports": [{"port": 443}]}]},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True},
        "grafanaDashboard": {"enabled": True},
        "imagePullSecrets": [{"name": "registry"}],
    },
    "cpu": yaml.safe_load((CHART / "values-cpu.yaml").read_text()),
    "gpu": yaml.safe_load((CHART / "values-gpu.yaml").read_text()),
}


def merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(values)
    for key, value in more.items():
        result[key] = merged(result[key], value) if isinstance(value, dict) and key in result else value
    return result


def manifests(render: ModuleType, values: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name."""
    files = render.template(merged(TOKEN, values))
    documents = [document for text in files.values() for document in yaml.safe_load_all(text) if document]
    found = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    assert len(found) == len(documents)
    return found


def pods(found: dict[tuple[str, str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The pod templates, by the name of what makes them."""
    kinds = ("Deployment", "StatefulSet")
    return {name: one["spec"]["template"] for (kind, name), one in found.items() if kind in kinds}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("version", ["1.27", "1.33"])
def test_what_helm_renders_is_valid(render: ModuleType, variant: str, version: str) -> None:
    for (kind, _), manifest in manifests(render, VARIANTS[variant]).items():
        if kind not in OPERATOR:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_a_planted_mistake_is_found(render: ModuleType) -> None:
    manifest = manifests(render, {})["StatefulSet", "vllm-deterministic-server"]
    manifest["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_helm_finds_nothing_to_complain_of() -> None:
    told = helm_python.lint(CHART, TOKEN, strict=True)
    assert told["errors"] == []
    assert [message["error"] for message in told["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"service": {"token": {"existingSecret": ""}}}, "existingSecret is needed"),
        ({"service": {"every": "often"}}, "/service/every"),
        ({"service": {"share": 2}}, "/service/share"),
        ({"service": {"mode": "aside"}}, "/service/mode"),
        ({"server": {"replicas": 0}}, "/server/replicas"),
        ({"server": {"image": {"tag": "latest"}}}, "/server/image/tag"),
        ({"server": {"image": {"tags": "1"}}}, "'tags' not allowed"),
        ({"server": {"enabled": False}}, "service.targets is needed"),
        ({"server": {"enabled": False}, "service": {"mode": "sidecar"}}, "sidecar needs server.enabled"),
    ],
)
def test_wrong_values_are_refused(render: ModuleType, values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm_python.HelmError, match=said):
        manifests(render, values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pod_is_pinned_probed_and_contained(render: ModuleType, variant: str) -> None:
    for pod in pods(manifests(render, VARIANTS[variant])).values():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False  # or VLLM_DETERMINISTIC_..._PORT would be read as settings
        for container in spec["containers"]:
            assert container["image"].endswith(":0.1.0")
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["livenessProbe"]["httpGet"]["path"] == "/health"
            ready = {"server": "/health", "service": "/ready"}[container["name"]]
            assert container["readinessProbe"]["httpGet"]["path"] == ready
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in spec["volumes"]}
            if container["name"] == "service":
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
                assert container["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_selects_finds_its_pods(render: ModuleType, variant: str) -> None:
    found = manifests(render, VARIANTS[variant])
    labels = [pod["metadata"]["labels"] for pod in pods(found).values()]
    ports = {port["name"] for pod in pods(found).values() for c in pod["spec"]["containers"] for port in c["ports"]}
    for (kind, name), manifest in found.items():
        spec = manifest.get("spec", {})
        selector = {
            "Service": lambda spec: spec["selector"],
            "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
            "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
        }.get(kind)
        if selector:
            assert any(selector(spec).items() <= one.items() for one in labels), name
        if kind == "Service":
            assert all(port["targetPort"] in ports for port in spec["ports"]), name


def test_every_replica_is_verified_at_its_own_address(render: ModuleType) -> None:
    found = manifests(render, {"server": {"replicas": 3}})
    server = found["StatefulSet", "vllm-deterministic-server"]["spec"]
    arguments = pods(found)["vllm-deterministic-service"]["spec"]["containers"][0]["args"]
    assert [word for word in arguments if word.startswith("replica-")] == [
        f"replica-{n}=http://vllm-deterministic-server-{n}.{server['serviceName']}:8000" for n in range(3)
    ]
    assert ("Service", server["serviceName"]) in found


def test_keys_come_from_secrets_alone(render: ModuleType) -> None:
    for pod in pods(manifests(render, VARIANTS["everything"])).values():
        for container in pod["spec"]["containers"]:
            for variable in container["env"]:
                secret = any(word in variable["name"] for word in ("TOKEN", "KEY"))
                assert secret == ("valueFrom" in variable), variable


def test_the_operator_gets_the_same_alerts_and_grafana_the_same_dashboard(render: ModuleType) -> None:
    found = manifests(render, VARIANTS["everything"])
    rules = yaml.safe_load((CHART / "files" / "rules.yml").read_text())
    assert found["PrometheusRule", "vllm-deterministic"]["spec"] == rules
    (shown,) = found["ConfigMap", "vllm-deterministic-dashboard"]["data"].values()
    assert shown.strip() == (CHART / "files" / "dashboard.json").read_text().strip()
    labels = found["Service", "vllm-deterministic-service"]["metadata"]["labels"]
    monitor = found["ServiceMonitor", "vllm-deterministic-service"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_plain_manifests_are_what_the_chart_renders(render: ModuleType, profile: str) -> None:
    file = DEPLOY / "kubernetes" / f"{profile}.yaml"
    assert file.read_text() == render.render(profile), "run deploy/kubernetes/render.py"
    for manifest in yaml.safe_load_all(file.read_text()):
        kubernetes_validate.validate(manifest, "1.33", strict=True)
