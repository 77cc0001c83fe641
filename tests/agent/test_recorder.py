"""What the recorder writes, and that `memkv plan` reads it back."""

import asyncio
import hashlib
from collections import Counter
from pathlib import Path

import pytest

from memkv_sglang.agent.recorder import MAX_QUEUED_PAGES, Recorder
from memkv_sglang.cli.main import main
from memkv_sglang.config.schema import MIB, RecorderConfig
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, Chain
from memkv_sglang.planning.traces import read_trace
from tests.cli.cli_node import PAGES, running_agent, spill_chain, start

NAMESPACE = bytes(range(NAMESPACE_DIGEST_SIZE))


def chain(name: str, pages: int) -> Chain:
    return Chain(NAMESPACE, [hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(pages)])


def record(file: Path, lookups: list[tuple[Chain, int]], **settings: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    recorder = Recorder(
        RecorderConfig(file=str(file), **settings),  # type: ignore[arg-type]
        lambda result, records: counts.update({result: records}),
    )
    for asked, hit in lookups:
        recorder.record(asked, hit)
        asyncio.run(recorder.flush())
    return counts


def test_chains_come_back_whole(tmp_path: Path) -> None:
    file = tmp_path / "lookups.jsonl"
    long, other = chain("a", 9), chain("b", 2)
    suffix = Chain(NAMESPACE, long.hashes[4:])
    lookups = [(chain("a", 6), 0), (long, 6), (other, 0), (long, 9), (suffix, 5)]
    assert record(file, lookups) == {"written": 5}
    trace = read_trace(file)
    assert [request.pages for request in trace.requests] == [6, 9, 2, 9, 5]
    assert [request.stored for request in trace.requests] == [0, 6, 0, 9, 5]
    first, longer, _, again, end = (request.runs() for request in trace.requests)
    assert longer[:6] == first
    assert again == longer
    assert end == longer[4:]
    assert (trace.pages, trace.ideal_hits) == (11, 6 + 9 + 5)


def test_only_new_suffixes_are_written_and_no_hash_is(tmp_path: Path) -> None:
    file = tmp_path / "lookups.jsonl"
    record(file, [(chain("a", 1000), 0)] + [(chain("a", 1001 + i), 1000 + i) for i in range(50)])
    content = file.read_bytes()
    assert len(content) < 16 * 1050 + 51 * 150
    assert chain("a", 1).hashes[0].hex()[:16].encode() not in content
    assert NAMESPACE.hex()[:16].encode() not in content
    assert file.stat().st_mode & 0o777 == 0o600


def test_files_are_rotated_and_each_stands_alone(tmp_path: Path) -> None:
    file = tmp_path / "lookups.jsonl"
    lookups = [(chain(f"{i}", 4000), 0) for i in range(60)]
    record(file, lookups, max_size=MIB, files=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lookups.jsonl",
        "lookups.jsonl.1",
        "lookups.jsonl.2",
    ]
    for path in tmp_path.iterdir():
        assert path.stat().st_size < 2 * MIB
        assert all(request.pages == 4000 for request in read_trace(path).requests)


def test_a_full_queue_drops_and_counts(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    recorder = Recorder(
        RecorderConfig(file=str(tmp_path / "f")),
        lambda result, records: counts.update({result: records}),
    )
    many = chain("a", MAX_QUEUED_PAGES // 4)
    for _ in range(6):
        recorder.record(many, 0)
    assert counts == {"dropped": 2}
    asyncio.run(recorder.flush())
    assert counts == {"dropped": 2, "written": 4}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_drops_and_counts(tmp_path: Path) -> None:
    file = tmp_path / "f"
    counts: Counter[str] = Counter()
    recorder = Recorder(
        RecorderConfig(file=str(file)), lambda result, records: counts.update({result: records})
    )
    recorder.record(chain("a", 3), 0)
    asyncio.run(recorder.flush())
    file.rename(tmp_path / "kept")
    file.symlink_to("/dev/full")
    recorder.record(chain("a", 5), 3)
    asyncio.run(recorder.flush())
    file.unlink()
    (tmp_path / "kept").rename(file)
    recorder.record(chain("a", 5), 3)
    asyncio.run(recorder.flush())
    assert counts == {"written": 2, "dropped": 1}
    assert [request.pages for request in read_trace(file).requests] == [3, 5]


def test_lookups_of_a_real_agent_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lookups.jsonl"
    (tmp_path / "run").mkdir(mode=0o700)
    environ = {
        "MEMKV_CONFIG": "",
        "MEMKV_AGENT_SOCKET": str(tmp_path / "run" / "agent.sock"),
        "MEMKV_NVME_DIRECTORY": str(tmp_path / "nvme"),
        "MEMKV_NVME_CAPACITY": "64MiB",
        "MEMKV_NVME_SEGMENT_SIZE": "8MiB",
        "MEMKV_RECORDER_FILE": str(file),
    }
    with running_agent(environ) as client:
        stored = spill_chain(client)  # includes one lookup of the chain
        client.lookup(Chain(stored.namespace, stored.hashes[:5]))
    trace = read_trace(file)
    assert [(one.pages, one.stored) for one in trace.requests] == [(PAGES, PAGES), (5, 5)]
    assert main(["plan", "--trace", str(file), "--nvme", "1GiB"]) == 0
    assert "hits when the trace was recorded" in capsys.readouterr().out


def test_a_file_that_cannot_be_created_ends_the_agent_with_one_line(tmp_path: Path) -> None:
    process = start(
        {
            "MEMKV_CONFIG": "",
            "MEMKV_AGENT_SOCKET": str(tmp_path / "agent.sock"),
            "MEMKV_NVME_DIRECTORY": str(tmp_path / "nvme"),
            "MEMKV_RECORDER_FILE": str(tmp_path / "absent" / "lookups.jsonl"),
        },
        "agent",
    )
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "recorder.file" in err
