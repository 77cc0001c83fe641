"""Parts of a call that run in parallel."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from memkv_sglang.tiers.parallel import run_in_parallel


def test_no_part_runs_after_the_call_if_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The executor keeps such a part, and would run it with its next one: into used buffers."""
    runs: list[int] = []

    def run(part: int) -> int:
        runs.append(part)
        return part

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with ThreadPoolExecutor(2) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            parts = [(pool, partial(run, i)) for i in range(3)]
            assert run_in_parallel(parts) == [0, 1, 2]
        assert sorted(runs) == [0, 1, 2]
        pool.submit(int).result()
    assert sorted(runs) == [0, 1, 2]


def test_an_error_is_raised_after_all_parts_have_ended() -> None:
    may_end, ended = threading.Event(), threading.Event()

    def slow() -> None:
        may_end.wait()
        ended.set()

    def fail() -> None:
        may_end.set()
        raise ValueError("a part failed")

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="a part failed"):
        try:
            run_in_parallel([(pool, slow), (pool, fail)])
        finally:
            assert ended.is_set()
