"""One cluster for all faults of a test run."""

from collections.abc import Iterator

import pytest
from memkv_testbed.faults.cluster import Cluster
from memkv_testbed.faults.rounds import Rounds


@pytest.fixture(scope="package")
def rounds() -> Iterator[Rounds]:
    with Cluster() as cluster:
        rounds = Rounds(cluster)
        yield rounds
        rounds.close()
