"""Read the metrics of an agent."""

from dataclasses import dataclass
from typing import Any

import click

from memkv_sglang.cli.http import fetch

_TIMEOUT = 5.0


@dataclass(frozen=True)
class Samples:
    """The samples of all metrics at one time."""

    values: list[tuple[str, dict[str, str], float]]
    """Each sample's name, labels and value."""

    def total(self, name: str, /, **labels: str) -> float:
        """Return the sum of the samples with this name and these labels."""
        return sum(
            value
            for sample, given, value in self.values
            if sample == name and labels.items() <= given.items()
        )

    def as_list(self) -> list[dict[str, Any]]:
        """Return the samples for JSON."""
        return [
            {"name": name, "labels": labels, "value": value} for name, labels, value in self.values
        ]


def scrape(port: int) -> Samples:
    """Read metrics from a loopback port. Raises `click.ClickException` if nothing responds."""
    url = f"http://127.0.0.1:{port}/metrics"
    return parse_metrics(fetch(url, _TIMEOUT).decode(), url)


def parse_metrics(text: str, source: str) -> Samples:
    """Parse Prometheus' text format. Raises `click.ClickException`, which names the source."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        return Samples(
            [
                (sample.name, dict(sample.labels), sample.value)
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            ]
        )
    except ValueError as error:
        raise click.ClickException(f"invalid metrics from {source} ({error})") from None
