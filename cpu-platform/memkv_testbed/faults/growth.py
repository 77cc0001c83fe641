"""Whether processes keep what they take: threads, descriptors, memory, over many rounds."""

from collections.abc import Iterable

from memkv_testbed.faults.node import Resources, resources

WARM_UP = 4
"""Samples of a process that are left out: caches and pools fill."""


class Growth:
    """Compares the second half of each process's samples with the first.

    What is used for a while and given back (kept-alive connections, calls under way) goes up and
    down; what leaks is more at every moment of the second half than it ever was in the first.
    """

    def __init__(self) -> None:
        """Begin without a process."""
        self._samples: dict[int, list[Resources]] = {}

    def sample(self, pids: Iterable[int | None]) -> None:
        """Note what the processes have now."""
        for pid in pids:
            if pid is not None:
                self._samples.setdefault(pid, []).append(resources(pid))

    @property
    def longest(self) -> int:
        """Samples of the process that lived longest."""
        return max(map(len, self._samples.values()), default=0)

    def total(self) -> Resources:
        """Return the largest growth of any process, each resource by itself; 0 at least."""
        grown = [
            [last - first for first, last in zip(warm, settled, strict=True)]
            for warm, settled in map(_ends, self._samples.values())
        ]
        return Resources(*(max([0, *values]) for values in zip(*grown, strict=True)))


def _ends(samples: list[Resources]) -> tuple[Resources, Resources]:
    """Return the most that a process had early on, once warm, and the least that it had later."""
    settled = samples[WARM_UP:]
    half = len(settled) // 2
    if not half:
        return samples[-1], samples[-1]
    return (
        Resources(*(max(values) for values in zip(*settled[:half], strict=True))),
        Resources(*(min(values) for values in zip(*settled[half:], strict=True))),
    )
