"""Loads compete with the prefill speed that was measured on the server."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from memkv_sglang.plugin.prefill import MIN_TOKENS, PrefillSpeed

TOKEN, PAIR = 1e-4, 2e-8
"""Seconds to compute a token, and seconds more for each token before it."""


def cost(begin: int, end: int) -> float:
    return (end - begin) * (TOKEN + PAIR * (begin + end) / 2)


def batch(spans: list[tuple[int, int]], seconds: float, *, extend: bool = True) -> Any:
    """Return a batch of spans of prompts that was launched that long ago."""
    return SimpleNamespace(
        launch_ts=time.monotonic() - seconds,
        forward_mode=SimpleNamespace(is_extend_without_speculative=lambda: extend),
        prefix_lens=[begin for begin, _ in spans],
        extend_lens=[end - begin for begin, end in spans],
    )


def observed(*batches: list[tuple[int, int]]) -> PrefillSpeed:
    speed = PrefillSpeed()
    for spans in batches:
        speed._ended = 0.0  # the previous batch ended long before
        speed.observe(batch(spans, sum(cost(*span) for span in spans)))
    return speed


def test_no_speed_is_reported_before_a_measurement() -> None:
    assert PrefillSpeed().seconds(0, 16384) == 0


def test_the_cost_of_attention_is_included_for_long_prompts() -> None:
    speed = observed([(0, 4096)], [(4096, 8192)], [(0, 512), (0, 1024)])
    assert speed.seconds(0, 16384) == pytest.approx(cost(0, 16384), rel=0.02)
    assert speed.seconds(12288, 16384) == pytest.approx(cost(12288, 16384), rel=0.02)


def test_uninformative_batches_are_ignored() -> None:
    speed = observed([(0, MIN_TOKENS - 1)])
    speed.observe(batch([(0, 4096)], 5.0, extend=False))
    assert speed.seconds(0, 16384) == 0


def test_waiting_for_the_previous_batch_does_not_count() -> None:
    """Overlapped scheduling launches a batch while the previous one still runs."""
    speed = PrefillSpeed()
    speed.observe(batch([(0, 4096)], 1.0))
    # Launched together with the first, and ready right after it.
    speed.observe(batch([(0, 4096)], 1.0))
    assert 0 < speed.seconds(0, 4096) < 0.75


def test_a_configured_speed_is_used() -> None:
    speed = PrefillSpeed(1000.0)
    speed.observe(batch([(0, 4096)], 100.0))
    assert speed.seconds(100, 4100) == pytest.approx(4)
