"""The result of one run."""

from typing import NamedTuple


class Rate(NamedTuple):
    """Throughput and cost of a run."""

    bytes_per_second: float
    """Sum of all callers' throughput."""
    cpu: float
    """CPU seconds of the callers and the agent, without the server."""
    bytes: int
    agent_cpu: float = 0.0
    """CPU seconds of the agent."""
    samples: int = 0
    """Number of samples of the agent's CPU time."""
    lock_samples: int = 0
    """Number of samples in which the GIL was held."""

    @property
    def gb_per_second(self) -> float:
        """Throughput in GB/s."""
        return self.bytes_per_second / 1e9

    @property
    def cpu_per_gb(self) -> float:
        """CPU seconds per GB."""
        return self.cpu / (self.bytes / 1e9)

    @property
    def lock_ms_per_gb(self) -> float:
        """Milliseconds of the agent's CPU time with the GIL held, per GB."""
        return 1e3 * self.agent_cpu * self.lock_samples / self.samples / (self.bytes / 1e9)
