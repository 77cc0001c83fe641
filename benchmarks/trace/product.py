"""The planner's simulation of the NVMe tier, as a contestant of the replay."""

from collections.abc import Sequence

from typing_extensions import override

from benchmarks.trace.peers import Cache
from memkv_sglang.planning.disk import NAMESPACE, SimulatedDisk

__all__ = ["NAMESPACE", "ProductCache"]


class ProductCache(SimulatedDisk, Cache):
    """Decides page by page, as the NVMe tier does."""

    def __init__(self, pages: int) -> None:
        """See `Cache`."""
        SimulatedDisk.__init__(self, pages)

    @override
    def request(self, pages: Sequence[int]) -> int:
        hits = self.lookup(pages)
        self.spill(pages)
        return hits
