"""The I/O executor behaves the same with AIO and with threads."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest

from memkv_sglang.tiers.nvme.disk.base import DiskRequest, OutOfTimeError
from memkv_sglang.tiers.nvme.disk.direct_io import BLOCK, aligned_memory
from memkv_sglang.tiers.nvme.disk.io_executor import IoExecutor, IoTask
from memkv_sglang.tiers.nvme.disk.linux_aio import Context

BLOCKS = 64
DEPTH = 4


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file opened with O_DIRECT, in which each block is filled with its number."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([number]) * BLOCK for number in range(BLOCKS)))
    opened = os.open(path, os.O_RDWR | os.O_DIRECT)
    yield opened
    os.close(opened)


@pytest.fixture(params=["aio", "threads"])
def executor(request: pytest.FixtureRequest) -> Iterator[IoExecutor]:
    engine: Literal["aio", "threads"] = request.param
    executor = IoExecutor(DEPTH, engine, direct=True)
    yield executor
    executor.close()


def read(fd: int, memory: memoryview, number: int) -> IoTask[memoryview]:
    yield DiskRequest(fd, [memory[:1024], memory[1024:]], number * BLOCK, writes=False)
    return memory


def error_of(fd: int, memory: memoryview, offset: int) -> IoTask[Exception | None]:
    try:
        yield DiskRequest(fd, [memory], offset, writes=False)
    except Exception as error:
        return error
    return None


def test_results_are_in_order_and_each_buffer_has_its_bytes(fd: int, executor: IoExecutor) -> None:
    memory = aligned_memory(BLOCKS * BLOCK)
    buffers = [memory[i * BLOCK : (i + 1) * BLOCK] for i in range(BLOCKS)]
    filled = executor.run(read(fd, buffer, number) for number, buffer in enumerate(buffers))
    assert [bytes(each) for each in filled] == [bytes([n]) * BLOCK for n in range(BLOCKS)]


def test_task_may_make_several_requests(fd: int, executor: IoExecutor) -> None:
    def copy(source: int, target: int) -> IoTask[None]:
        memory = aligned_memory(BLOCK)
        yield DiskRequest(fd, [memory], source * BLOCK, writes=False)
        yield DiskRequest(fd, [memory], target * BLOCK, writes=True)

    executor.run(copy(number, number + 32) for number in range(32))
    content = b"".join(
        map(bytes, executor.run(read(fd, aligned_memory(BLOCK), n) for n in range(64)))
    )
    assert content[32 * BLOCK :] == content[: 32 * BLOCK]


def test_errors_are_raised_in_the_task(fd: int, executor: IoExecutor) -> None:
    memory = aligned_memory(2 * BLOCK)
    after_end, across_end, closed, intact = executor.run(
        [
            error_of(fd, memory[:BLOCK], BLOCKS * BLOCK),
            error_of(fd, memory, (BLOCKS - 1) * BLOCK),
            error_of(-1, memory, 0),
            error_of(fd, memory, 0),
        ]
    )
    assert isinstance(after_end, EOFError)
    assert isinstance(across_end, EOFError)
    assert isinstance(closed, OSError)
    assert intact is None


def test_no_request_starts_after_the_deadline(fd: int, executor: IoExecutor) -> None:
    memory = aligned_memory(BLOCK)
    [error] = executor.run([error_of(fd, memory, BLOCK)], deadline=0)
    assert isinstance(error, OutOfTimeError)
    assert bytes(memory) == bytes(BLOCK)


def test_failing_tasks_end_the_run_after_all_requests_completed(
    tmp_path: Path, executor: IoExecutor
) -> None:
    size, count = 2 << 20, 8
    path = tmp_path / "large"
    path.write_bytes(b"".join(bytes([number + 1]) * size for number in range(count)))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    memory = aligned_memory(count * size)
    buffers = [memory[i * size : (i + 1) * size] for i in range(count)]

    def fail(number: int) -> IoTask[None]:
        yield DiskRequest(fd, [buffers[number]], number * size, writes=False)
        raise ValueError("raised by the task")

    executor.depth = count
    with pytest.raises(ValueError, match="raised by the task"):
        executor.run(map(fail, range(count)))
    assert [buffer[-1] for buffer in buffers] == [number + 1 for number in range(count)]
    os.close(fd)


def test_failing_task_waits_for_a_blocked_thread(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    go, held, failed = threading.Event(), threading.Event(), threading.Event()
    real = os.preadv

    def hold(file: int, buffers: list[memoryview], offset: int) -> int:
        if offset == BLOCK:
            held.set()
            go.wait(20)
        return real(file, buffers, offset)

    def fail() -> IoTask[None]:
        yield DiskRequest(fd, [aligned_memory(BLOCK)], 0, writes=False)
        assert held.wait(20)
        failed.set()
        raise ValueError("raised by the task")

    monkeypatch.setattr(os, "preadv", hold)
    executor, slow = IoExecutor(DEPTH, "threads", direct=True), aligned_memory(BLOCK)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(executor.run, [fail(), read(fd, slow, 1)])
        assert failed.wait(20)
        with pytest.raises(TimeoutError):
            running.result(0.2)
        go.set()
        with pytest.raises(ValueError, match="raised by the task"):
            running.result(20)
    assert bytes(slow) == bytes([1]) * BLOCK
    executor.close()


def test_request_rejected_by_aio_is_executed_synchronously(
    fd: int, executor: IoExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "submit", refuse)
    [memory] = executor.run([read(fd, aligned_memory(BLOCK), 5)])
    assert bytes(memory) == bytes([5]) * BLOCK


def test_threads_replace_unavailable_aio(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "__init__", refuse)
    executor = IoExecutor(DEPTH, "aio", direct=True)
    [memory] = executor.run([read(fd, aligned_memory(BLOCK), 7)])
    assert bytes(memory) == bytes([7]) * BLOCK
    executor.close()


def refuse(*_: object) -> None:
    raise OSError("refused")
