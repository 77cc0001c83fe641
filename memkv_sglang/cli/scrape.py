"""The agent's metrics, read from its loopback port."""

import urllib.request
from dataclasses import dataclass
from typing import Any

import click

_TIMEOUT = 5.0


@dataclass(frozen=True)
class Samples:
    """The samples of one scrape."""

    values: list[tuple[str, dict[str, str], float]]
    """Name, labels and value of each."""

    def total(self, name: str, /, **labels: str) -> float:
        """Return the sum over the samples with this name and these labels."""
        return sum(
            value
            for sample, have, value in self.values
            if sample == name and labels.items() <= have.items()
        )

    def as_list(self) -> list[dict[str, Any]]:
        """Return the samples for JSON."""
        return [
            {"name": name, "labels": labels, "value": value} for name, labels, value in self.values
        ]


def scrape(port: int) -> Samples:
    """Read the metrics; raises `click.ClickException` if nobody answers."""
    from prometheus_client.parser import text_string_to_metric_families

    url = f"http://127.0.0.1:{port}/metrics"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=_TIMEOUT) as response:
            text = response.read().decode()
    except OSError as error:
        raise click.ClickException(f"no metrics from {url} ({error})") from None
    return Samples(
        [
            (sample.name, dict(sample.labels), sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
    )
