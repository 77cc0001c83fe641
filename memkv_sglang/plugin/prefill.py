"""How fast this server computes prompts: what a load has to compete with."""

import time
from typing import Any

from memkv_sglang.time_model import TimeModel

MIN_TOKENS = 256
"""Batches of fewer tokens tell more of what a batch costs than of its tokens."""


class PrefillSpeed:
    """Learns from the batches of prompt tokens that the scheduler has run.

    A token costs a part that is the same for each, and a part that grows with the tokens before
    it (attention). Observed by the scheduler's thread, asked by others.
    """

    def __init__(self, tokens_per_second: float = 0.0) -> None:
        """Take the speed as given; 0: learn it."""
        self._given = tokens_per_second
        self._model = TimeModel()
        self._ended = 0.0

    def observe(self, batch: Any) -> None:
        """Take note of a batch of SGLang's (`ScheduleBatch`) whose results are there.

        With overlapped scheduling a batch waits for the one before it, whose time is not its own.
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
        """Return how long the tokens from `begin` to `end` of a prompt take; 0 if not known."""
        tokens = end - begin
        if self._given:
            return tokens / self._given
        return self._model.predict(tokens, tokens * (begin + end) / 2) or 0.0
