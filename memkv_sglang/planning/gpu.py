"""Simulate one model replica, which prefills one batch at a time and decodes in between."""

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from memkv_sglang.planning.calibration import PrefillCost, StepCost
from memkv_sglang.planning.events import EventLoop

CHUNK = 16_384
"""Maximum new tokens of a prefill batch (SGLang's `--max-prefill-tokens`). A longer prompt is a
batch of its own."""


@dataclass(eq=False)
class Job:
    """A request on a replica."""

    new: float
    """Number of tokens to compute."""
    cached: float
    """Number of tokens before the new ones. Their KV is in memory."""
    output: float
    """Number of tokens to generate."""
    first_token: Callable[[], None]
    done: Callable[[], None]

    @property
    def tokens(self) -> float:
        """Number of tokens in device memory when the job ends."""
        return self.new + self.cached + self.output


class Replica:
    """Serves jobs in order of arrival. Like SGLang, it prefers prefill to decode.

    A job waits until device memory has room for all its tokens.
    """

    def __init__(
        self, loop: EventLoop, prefill: PrefillCost, step: StepCost, tokens: float
    ) -> None:
        """Hold at most `tokens` tokens in device memory. A larger job runs alone."""
        self._loop = loop
        self._prefill = prefill
        self._step = step
        self._capacity = tokens
        self._queue: deque[Job] = deque()
        self._used = 0.0
        self._occupied = 0.0
        """Sum of tokens in use times seconds, until `_occupied_since`."""
        self._occupied_since = 0.0
        self._is_prefilling = False
        self._backlog = 0.0
        """Total prefill time of the waiting jobs, in seconds."""
        self._batch_end = 0.0
        self._prefill_seconds = 0.0
        self._decoding: list[tuple[float, int, Job]] = []
        """Running jobs as a heap by their end. The end is in tokens that the batch has generated so
        far."""
        self._generated = 0.0
        self._contexts = 0.0
        self._rate = 0.0
        self._since = 0.0
        self._version = 0
        self._count = 0

    @property
    def jobs(self) -> int:
        """Number of waiting and running jobs."""
        return len(self._queue) + self._count

    @property
    def wait(self) -> float:
        """Seconds of prefill ahead of a new job."""
        return self._backlog + max(self._batch_end - self._loop.now, 0.0)

    @property
    def prefill_seconds(self) -> float:
        """Seconds of prefill so far."""
        return self._prefill_seconds - max(self._batch_end - self._loop.now, 0.0)

    @property
    def memory_seconds(self) -> float:
        """Share of the device memory that running jobs used, times seconds."""
        self._occupy(0)
        return self._occupied / self._capacity

    def _occupy(self, tokens: float) -> None:
        now = self._loop.now
        self._occupied += min(self._used, self._capacity) * (now - self._occupied_since)
        self._occupied_since = now
        self._used += tokens

    def submit(self, job: Job) -> None:
        """Queue a job whose cached tokens are in memory."""
        self._queue.append(job)
        self._backlog += self._prefill.marginal(job.new, job.cached)
        self._start_prefill()

    def _start_prefill(self) -> None:
        if self._is_prefilling:
            return
        batch: list[Job] = []
        new = 0.0
        while self._queue:
            job = self._queue[0]
            fits = not self._used or self._used + job.tokens <= self._capacity
            if not fits or (batch and new + job.new > CHUNK):
                break
            self._queue.popleft()
            self._occupy(job.tokens)
            new += job.new
            batch.append(job)
        if not batch:
            return
        costs = sum(self._prefill.marginal(job.new, job.cached) for job in batch)
        self._backlog = max(self._backlog - costs, 0.0)
        self._count += len(batch)
        self._is_prefilling = True
        self._set_rate()
        seconds = self._prefill.fixed + costs
        self._prefill_seconds += seconds
        self._batch_end = self._loop.now + seconds
        self._loop.after(seconds, lambda: self._end_prefill(batch))

    def _end_prefill(self, batch: list[Job]) -> None:
        self._is_prefilling = False
        self._advance()
        for job in batch:
            self._version += 1  # the number also makes the heap's entries unique
            heapq.heappush(self._decoding, (self._generated + job.output, self._version, job))
            self._contexts += job.new + job.cached
        for job in batch:
            job.first_token()
        self._start_prefill()
        if not self._is_prefilling:
            self._set_rate()

    def _advance(self) -> None:
        elapsed = self._loop.now - self._since
        self._generated += self._rate * elapsed
        self._since = self._loop.now

    def _set_rate(self) -> None:
        """Decode at the batch's speed, or pause during prefill."""
        self._advance()
        self._version += 1
        if self._is_prefilling or not self._decoding:
            self._rate = 0.0
            return
        self._rate = 1 / self._step.seconds(self._contexts)
        left = max(self._decoding[0][0] - self._generated, 0.0)
        version = self._version
        self._loop.after(left / self._rate, lambda: self._end_decode(version))

    def _end_decode(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        ended = []
        slack = 1e-9 * max(1.0, math.fabs(self._generated))
        while self._decoding and self._decoding[0][0] <= self._generated + slack:
            ended.append(heapq.heappop(self._decoding)[2])
        for job in ended:
            self._occupy(-job.tokens)
            self._contexts -= job.new + job.cached
            self._count -= 1
        self._start_prefill()
        if not self._is_prefilling:
            self._set_rate()
        for job in ended:
            job.done()
