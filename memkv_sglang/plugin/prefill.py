"""Measure how fast this server computes prompts, so that slow loads can be skipped."""

import time
from typing import Any

from memkv_sglang.time_model import TimeModel

MIN_TOKENS = 256
"""Smaller batches are dominated by the fixed cost of a batch, so they are ignored."""


class PrefillSpeed:
    """Learns the prefill speed from batches that the scheduler has run.

    Each token has a fixed cost and one that grows with the tokens before it (attention). The
    scheduler's thread calls `observe`; any thread may call `seconds`.
    """

    def __init__(self, tokens_per_second: float = 0.0) -> None:
        """Use a given speed, or learn it if 0."""
        self._given = tokens_per_second
        self._model = TimeModel()
        self._ended = 0.0

    def observe(self, batch: Any) -> None:
        """Record the duration of a finished `ScheduleBatch`.

        With overlap scheduling a batch may wait for the previous one; that time does not count.
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
