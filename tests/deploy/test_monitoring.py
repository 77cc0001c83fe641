"""Alerts and dashboards use metrics and labels that exist, and every alert is documented."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memkv_sglang.metrics_document import (
    agent_metrics,
    exposed_name,
    server_metrics,
    shard_metrics,
)
from tests.deploy.queries import (
    BOARDS,
    DEPLOY,
    Expression,
    alerts,
    expressions,
    groupings,
    selectors,
)

ROOT = DEPLOY.parent
OF_PROMETHEUS = {"job", "instance", "alertname", "alertstate"}
OF_THE_PROCESS = {
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_open_fds",
}
"""Metrics of prometheus_client, which the agent exposes as well."""


def known() -> dict[str, dict[str, set[str]]]:
    """Return every series name with its labels and their values."""
    found: dict[str, dict[str, set[str]]] = {name: {} for name in OF_THE_PROCESS}
    for metric in [*agent_metrics(), *shard_metrics(), *server_metrics()]:
        names = [exposed_name(metric)]
        if metric.type == "histogram":
            names = [f"{metric.name}_{part}" for part in ("bucket", "sum", "count")]
        for name in names:
            labels = found.setdefault(name, {})
            for sample in metric.samples:
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
    return found


KNOWN = known()


@pytest.mark.parametrize("expression", list(expressions()), ids=lambda one: str(one.where))
def test_metrics_and_labels_exist(expression: Expression) -> None:
    labels = set(OF_PROMETHEUS)
    for name, matchers in selectors(expression.text):
        assert name in KNOWN, f"no metric {name}"
        labels |= KNOWN[name].keys()
        for label, (how, value) in matchers.items():
            if label in OF_PROMETHEUS:
                continue
            values = KNOWN[name][label]
            wanted = value.split("|") if how in ("=~", "!~") else [value]
            assert values >= set(wanted), f"{name} has no {label}={value}"
    assert groupings(expression.text) <= labels


def test_every_alert_is_documented() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    documented = set(re.findall(r"^\| `(Memkv\w+)` \|", page, re.MULTILINE))
    assert documented == {rule["alert"] for rule in alerts()}


def test_the_dashboards_are_generated() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "dashboards.py"))
    assert {board.name for board in BOARDS} == made["BOARDS"].keys()
    for board in BOARDS:
        assert board.read_text() == made["text"](made["BOARDS"][board.name]()), (
            "run: python tools/dashboards.py"
        )


def differences(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """Yield what of `ours` is missing in `theirs` or differs there."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name, value in ours.items():
            yield from differences(value, theirs.get(name), f"{where}.{name}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(one, other, f"{where}[{i}]")
    elif ours != theirs:
        yield f"{where}: {ours!r}, read as {theirs!r}"


@pytest.mark.slow
@pytest.mark.parametrize("board", BOARDS, ids=lambda board: str(board.name))
def test_grafanas_own_models_know_every_field(board: Path) -> None:
    """Read with Grafana's SDK (PyPI: grafana-foundation-sdk), which drops unknown fields."""
    encoder: Any = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    plugins: Any = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    models: Any = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    plugins.register_default_plugins()  # panels and queries
    ours = json.loads(board.read_text())
    theirs = json.loads(encoder.JSONEncoder().encode(models.Dashboard.from_json(ours)))
    assert list(differences(ours, theirs)) == []


def test_panels_do_not_overlap_and_stay_on_the_grid() -> None:
    for board in BOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(board.read_text())["panels"]:
            place = panel["gridPos"]
            cells = {
                (place["x"] + x, place["y"] + y)
                for x in range(place["w"])
                for y in range(place["h"])
            }
            assert not cells & taken
            assert max(x for x, _ in cells) < 24
            taken |= cells


def test_the_chart_ships_the_same_files() -> None:
    files = DEPLOY / "kubernetes" / "memkv" / "files"
    for original in [DEPLOY / "prometheus" / "alerts.yaml", *BOARDS]:
        assert (files / original.name).read_text() == original.read_text()
    assert Path(files / "alerts.yaml").is_symlink()
