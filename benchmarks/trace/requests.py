"""The requests to replay."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TRACE = Path(__file__).parent.parent / "traces" / "mooncake_synthetic_trace.jsonl.gz"
PAGE_TOKENS = 512
"""Tokens per block of the trace. A block is a page here; a partial last block counts as a whole."""

Requests = Sequence[Sequence[int]]
"""The pages of each request's prompt, as numbers."""


class Workload(NamedTuple):
    """Requests, and what follows from them."""

    name: str
    requests: Requests
    seconds: Sequence[float] = ()
    """Arrival time of each request, in seconds since the first."""

    def first(self, count: int) -> "Workload":
        """Return the first `count` requests."""
        return self._replace(requests=self.requests[:count], seconds=self.seconds[:count])

    @property
    def pages(self) -> int:
        """Number of different pages."""
        return len({page for request in self.requests for page in request})

    @property
    def ideal_hits(self) -> int:
        """Number of pages that an infinite cache would have hit."""
        seen: set[int] = set()
        hits = 0
        for request in self.requests:
            hits += next((i for i, page in enumerate(request) if page not in seen), len(request))
            seen.update(request)
        return hits


def mooncake() -> Workload:
    """Read the trace published with Mooncake (FAST'25); see `benchmarks/traces`."""
    with gzip.open(TRACE, "rt") as file:
        records = [json.loads(line) for line in file]
    seconds = [record["timestamp"] / 1000 for record in records]
    return Workload("mooncake", [record["hash_ids"] for record in records], seconds)
