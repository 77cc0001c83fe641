"""Measure how fast this server computes prompts, so that slow loads can be skipped."""

import time
from typing import Any

from memkv_sglang.time_model import TimeModel

MIN_TOKENS = 256
"""Smaller batches are ignored, because the fixed cost of a batch dominates their time."""


class PrefillSpeed:
    """Learns the prefill speed from batches that the scheduler has run.

    A token costs a fixed time, and a time that grows with the tokens before it (attention). The
    scheduler's thread calls `observe`. Any thread may call `seconds`.
    """

    def __init__(self, tokens_per_second: float = 0.0) -> None:
        """Use the given speed; 0 means to learn it."""
        self._given = tokens_per_second
        self._model = TimeModel()
        self._ended = 0.0

    def observe(self, batch: Any) -> None:
        """Record the duration of a finished `ScheduleBatch`.

        With overlap scheduling, a batch may wait for the previous one. That time does not count.
        """
        now, launched = time.monotonic(), batch.launch_ts
        began, self._ended = max(launched or now, self._ended), now
        if not launched or not batch.forward_mode.is_extend_without_speculative():
            return
        spans = list(zip(batch.prefix_lens or (), batch.extend_lens or (), strict=False))
        tokens = sum(new for _, new in spans)
        if tokens >= MIN_TOKENS:
            before = sum(new * (known + new / 2) for known, new in spans)
            self._model.observe(tokens, before, now - began)

    def seconds(self, begin: int, end: int) -> float:
        """Return the seconds to compute a prompt's tokens from `begin` to `end`; 0 if unknown."""
        tokens = end - begin
        if self._given:
            return tokens / self._given
        return self._model.predict(tokens, tokens * (begin + end) / 2) or 0.0
