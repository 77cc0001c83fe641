"""64 clients at full rate for ten seconds; `python -m benchmarks load` takes ten minutes."""

from collections.abc import Iterator

import msgspec
import pytest
from memkv_testbed.faults.cluster import ENGINE, Cluster
from memkv_testbed.faults.load import BACKLOG, BATCH, CAPACITY, put_under_load

CLIENTS = 64
SECONDS = 10.0


@pytest.fixture
def small_disk() -> Iterator[Cluster]:
    engine = msgspec.structs.replace(ENGINE, upload_backlog=BACKLOG)
    with Cluster(engine=engine, capacity=CAPACITY) as cluster:
        yield cluster


@pytest.mark.soak
def test_many_clients_at_full_rate(small_disk: Cluster) -> None:
    loaded = put_under_load(small_disk, CLIENTS, SECONDS)
    print(f"{loaded.tally.calls} calls, lookups {loaded.percentile(0.99):.3f} s (p99)")
    print(f"{loaded.most_bytes / CAPACITY:.3f} of the capacity")
    print(f"{loaded.most_queued / BACKLOG:.3f} of the backlog")
    assert loaded.tally.errors == []
    assert loaded.tally.wrong == 0
    assert loaded.tally.hung == 0
    assert loaded.tally.hits > 0
    assert loaded.most_bytes <= CAPACITY + BATCH
    assert loaded.most_queued <= BACKLOG + BATCH
    assert loaded.last.memory_mb - loaded.first.memory_mb < 64
