"""The Helm chart: rendered for every values file, linted, and validated strictly.

Needs helm, in PATH or in `~/.cache/sglang-memkv/bin`
(`go install helm.sh/helm/v3/cmd/helm@latest`), and the package kubernetes-validate from PyPI.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from memkv_sglang.config.load import load_config

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
CHART = KUBERNETES / "memkv"
VALUES = [None, *sorted((KUBERNETES / "values").glob("*.yaml"))]
VERSION = "1.33"
"""Version of Kubernetes whose schemas the tests use."""

CUSTOM = {"PodMonitor", "PrometheusRule"}
"""Kinds that the Prometheus operator defines."""

_CACHED = Path.home() / ".cache" / "sglang-memkv" / "bin" / "helm"
HELM = shutil.which("helm") or (str(_CACHED) if _CACHED.exists() else "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HELM, reason="needs helm"),
    pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem if path else "default"),
]


def helm(*arguments: str | Path) -> str:
    done = subprocess.run([HELM, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def chosen(values: Path | None) -> list[str | Path]:
    return ["--values", values] if values else []


def render(values: Path | None) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    text = helm("template", "cache", CHART, *chosen(values))
    return [document for document in yaml.safe_load_all(text) if document]


def agent_pod(values: Path | None) -> dict[str, Any]:
    (daemon,) = [d for d in render(values) if d["kind"] == "DaemonSet"]
    pod: dict[str, Any] = daemon["spec"]["template"]["spec"]
    return pod


def test_chart_passes_lint(values: Path | None) -> None:
    helm("lint", "--strict", CHART, *chosen(values))


def test_objects_are_valid(values: Path | None) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    kinds = set()
    for document in render(values):
        kinds.add(document["kind"])
        if document["kind"] not in CUSTOM:
            validator.validate(document, VERSION, strict=True)
    assert "DaemonSet" in kinds


def test_agents_settings_are_valid(values: Path | None) -> None:
    environment = {
        item["name"]: item["value"] for item in agent_pod(values)["containers"][0]["env"]
    }
    config = load_config(None, {**environment, "MEMKV_CONFIG": ""}, {})
    assert config.nvme.directory or config.minio.endpoint


def test_agent_is_confined_and_its_secrets_are_private(values: Path | None) -> None:
    pod = agent_pod(values)
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    secrets = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert all(secret["defaultMode"] == 0o440 for secret in secrets)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_alerts_and_dashboards_are_those_of_the_repository(values: Path | None) -> None:
    found = {document["kind"]: document for document in render(values)}
    if values is None or values.stem != "fleet":
        assert not {"PrometheusRule", "ConfigMap"} & found.keys()
        return
    yaml = pytest.importorskip("yaml")
    deploy = KUBERNETES.parent
    rules = yaml.safe_load((deploy / "prometheus" / "alerts.yaml").read_text())
    assert found["PrometheusRule"]["spec"] == rules
    boards = {name: json.loads(text) for name, text in found["ConfigMap"]["data"].items()}
    assert boards == {
        f"memkv-{board.name}": json.loads(board.read_text())
        for board in (deploy / "grafana").glob("*.json")
    }


def test_agent_and_servers_share_user_and_socket(values: Path | None) -> None:
    pods = [
        d["spec"]["template"]["spec"]
        for d in render(values)
        if d["kind"] in ("DaemonSet", "Deployment")
    ]
    assert len(pods) == 2
    shared = [
        (
            pod["securityContext"]["runAsUser"],
            [os.fspath(v["hostPath"]["path"]) for v in pod["volumes"] if v["name"] == "socket"],
        )
        for pod in pods
    ]
    assert shared[0] == shared[1]
