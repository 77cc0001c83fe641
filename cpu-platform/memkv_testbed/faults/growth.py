"""Detect leaks of threads, descriptors and memory over many rounds."""

from collections.abc import Iterable

from memkv_testbed.faults.node import Resources, resources

WARM_UP = 4
"""Number of a process's first samples to ignore, while its caches and pools fill."""


class Growth:
    """Compares the last third of each process's samples with the first.

    Resources that are used and returned (idle connections, calls in flight) go up and down. A leak
    makes every sample of the last third exceed every sample of the first, by more the longer it
    goes on; a thread that starts on demand adds 1 once.
    """

    def __init__(self) -> None:
        """Start without samples."""
        self._samples: dict[int, list[Resources]] = {}

    def sample(self, pids: Iterable[int | None]) -> None:
        """Record what resources the processes use now."""
        for pid in pids:
            if pid is not None:
                self._samples.setdefault(pid, []).append(resources(pid))

    @property
    def longest(self) -> int:
        """Number of samples of the longest-lived process."""
        return max(map(len, self._samples.values()), default=0)

    def total(self) -> Resources:
        """Return the largest growth of any process, for each resource; at least 0."""
        grown = [
            [late - early for early, late in zip(first, last, strict=True)]
            for first, last in map(_thirds, self._samples.values())
        ]
        return Resources(*(max([0, *values]) for values in zip(*grown, strict=True)))


def _thirds(samples: list[Resources]) -> tuple[Resources, Resources]:
    """Return the maximum of the first third and the minimum of the last, after the warm-up."""
    settled = samples[WARM_UP:]
    third = len(settled) // 3
    if not third:
        return samples[-1], samples[-1]
    return (
        Resources(*(max(values) for values in zip(*settled[:third], strict=True))),
        Resources(*(min(values) for values in zip(*settled[-third:], strict=True))),
    )
