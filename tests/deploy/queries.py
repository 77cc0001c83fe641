"""The PromQL expressions of the alerts and dashboards, and what they use."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

yaml: Any = pytest.importorskip("yaml")

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
BOARDS = sorted((DEPLOY / "grafana").glob("*.json"))

_SELECTOR = re.compile(r"\b((?:memkv|process)_[a-z_]+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")


class Expression(NamedTuple):
    where: str
    text: str


def alerts() -> list[dict[str, Any]]:
    """Return the alerting rules."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels(board: Path) -> list[dict[str, Any]]:
    """Return the panels of a dashboard, without its rows."""
    return [one for one in json.loads(board.read_text())["panels"] if one["type"] != "row"]


def expressions() -> Iterator[Expression]:
    """Yield every expression, with Grafana's variables replaced."""
    for rule in alerts():
        yield Expression(rule["alert"], rule["expr"])
    for board in BOARDS:
        for panel in panels(board):
            for target in panel["targets"]:
                yield Expression(f"{board.name}: {panel['title']}", target["expr"])


def fill_in(text: str, instance: str, window: str) -> str:
    """Replace Grafana's variables."""
    text = text.replace("$instance", instance).replace("$job", ".+")
    return text.replace("$__rate_interval", window).replace("$__range", window)


def selectors(text: str) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """Yield each metric with its label matchers: operator and value by label."""
    for name, matchers in _SELECTOR.findall(re.sub(r"\b(?:by|on) \([^)]*\)", "", text)):
        yield name, {label: (how, value) for label, how, value in _MATCHER.findall(matchers)}


def groupings(text: str) -> set[str]:
    """Return the labels that the expression groups by."""
    return {label.strip() for labels in _GROUPING.findall(text) for label in labels.split(",")} - {
        ""
    }
