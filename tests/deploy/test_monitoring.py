"""Alerts and dashboards use metrics and labels that exist, and every alert is documented."""

import re
import runpy
from pathlib import Path

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


def test_panels_do_not_overlap_and_stay_on_the_grid() -> None:
    import json

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
