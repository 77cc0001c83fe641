"""The requests to replay."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TRACE = Path(__file__).parent.parent / "traces" / "mooncake_synthetic_trace.jsonl.gz"
PAGE_TOKENS = 512
"""Tokens of a block of the trace, which is a page here; a partial last one counts as a whole."""

Requests = Sequence[Sequence[int]]
"""The pages of each request's prompt, named by numbers."""


class Workload(NamedTuple):
    """Requests and their derived properties."""

    name: str
    requests: Requests
    seconds: Sequence[float] = ()
    """Arrival time of each request, in seconds since the first."""

    def first(self, count: int) -> "Workload":
        """Return the first requests."""
        return self._replace(requests=self.requests[:count], seconds=self.seconds[:count])

    @property
    def pages(self) -> int:
        """Return the number of different pages."""
        return len({page for request in self.requests for page in request})

    @property
    def ideal_hits(self) -> int:
        """Return the hits of an infinite cache, in pages."""
        seen: set[int] = set()
        hits = 0
        for request in self.requests:
            hits += next((i for i, page in enumerate(request) if page not in seen), len(request))
            seen.update(request)
        return hits


def mooncake() -> Workload:
    """Read the trace that was published with Mooncake (FAST'25); see `benchmarks/traces`."""
    with gzip.open(TRACE, "rt") as file:
        records = [json.loads(line) for line in file]
    seconds = [record["timestamp"] / 1000 for record in records]
    return Workload("mooncake", [record["hash_ids"] for record in records], seconds)
