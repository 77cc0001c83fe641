"""Recovery after a kill, with a torn or lost journal, and with lost or unknown files."""

import errno
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memkv_sglang.page import Chain, PageKey
from memkv_sglang.testing.conformance import load, soon, spill
from memkv_sglang.testing.pages import make_chain, make_hashes, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, PendingPage, SpillResult
from memkv_sglang.tiers.nvme import NvmeTier
from memkv_sglang.tiers.nvme.catalog import Catalog, NewPage
from memkv_sglang.tiers.nvme.files import Folder
from memkv_sglang.tiers.nvme.journal import Journal
from memkv_sglang.tiers.nvme.recovery import recover
from memkv_sglang.tiers.nvme.segment import Place, create_segment
from memkv_sglang.tiers.nvme.segments import Segments
from tests.tiers.nvme.nvme_support import SLOT, Disk, capacity_for, disk, present

NAMESPACE = make_namespace()


def chain(name: str, count: int) -> Chain:
    return make_chain(NAMESPACE, count, name)


@pytest.fixture
def nvme(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path / "nvme", queue_depth=2) as opened:
        yield opened


def restart_without_journal(nvme: Disk) -> NvmeTier:
    nvme.kill()
    nvme.journal.unlink()
    return nvme.open()


def test_acknowledged_pages_and_marks_survive_a_kill(nvme: Disk) -> None:
    first, second = chain("first", 9).keys(), chain("second", 4).keys()
    spill(nvme.tier, first)
    nvme.tier.mark_pending([*first[5:], chain("unknown", 1).keys()[0]])
    spill(nvme.tier, second)
    nvme.tier.mark_pending(second)
    nvme.tier.mark_pending(first)
    nvme.tier.mark_uploaded(first[6:8])
    nvme.kill()
    tier = nvme.open()
    load(tier, [*first, *second])
    waiting = [first[5], first[8], *second, *first[:5]]
    assert list(tier.pending()) == [PendingPage(key, 8192) for key in waiting]
    assert list(nvme.reopen().pending()) == [PendingPage(key, 8192) for key in waiting]


def test_removals_survive_a_kill(nvme: Disk) -> None:
    keys = chain("chain", 8).keys()
    spill(nvme.tier, keys)
    nvme.tier.remove(keys[3:])
    nvme.kill()
    assert present(nvme.open(), keys) == [True] * 3 + [False] * 5
    nvme.tier.clear(NAMESPACE.digest)
    nvme.kill()
    assert nvme.open().usage().pages == 0


def test_journal_torn_at_every_byte_of_its_last_frame(nvme: Disk, tmp_path: Path) -> None:
    keys = chain("chain", 3).keys()
    spill(nvme.tier, keys[:2])
    whole = nvme.journal.stat().st_size
    spill(nvme.tier, keys[2:])
    nvme.kill()
    content = nvme.journal.read_bytes()
    assert whole < len(content)
    for size in range(whole, len(content) + 1):
        nvme.journal.write_bytes(content[:size])
        with_last = size == len(content)
        tier = nvme.open()
        assert present(tier, keys) == [True, True, with_last]
        assert tier.check_integrity() == []
        tier.close()
    load(nvme.open(), keys)


def test_frames_appended_after_a_torn_one_are_read(nvme: Disk) -> None:
    keys = chain("chain", 6).keys()
    spill(nvme.tier, keys[:4])
    nvme.kill()
    with nvme.journal.open("r+b") as file:
        file.truncate(nvme.journal.stat().st_size - 1)
    spill(nvme.open(), keys[4:])
    nvme.kill()
    assert present(nvme.open(), keys) == [False] * 4 + [True] * 2


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "a bit in the middle"])
def test_unreadable_journal_is_rebuilt_from_footers(nvme: Disk, damage: str) -> None:
    keys = chain("chain", 7).keys()
    odd = chain("odd", 3).keys()
    for i in range(7):
        spill(nvme.tier, keys[i : i + 1])
    spill(nvme.tier, odd, (1000, 5000, 7))
    nvme.kill()
    content = bytearray(nvme.journal.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        nvme.journal.unlink()
    else:
        nvme.journal.write_bytes({"empty": b"", "garbage": bytes(999)}.get(damage, content))
    tier = nvme.open()
    load(tier, keys)
    load(tier, odd, (1000, 5000, 7))
    assert tier.usage().pages == 10
    assert tier.check_integrity() == []
    nvme.kill()
    load(nvme.open(), keys)


@pytest.mark.parametrize("newer_slot", [0, 5])
def test_newest_copy_wins_without_a_journal(nvme: Disk, newer_slot: int) -> None:
    """The older of two slots with the same key is damaged, so only the newer one is correct."""
    a, b, key, c, d = chain("pages", 5).keys()
    spill(nvme.tier, [a, b, key, c])
    nvme.flip(key)
    nvme.tier.remove([key])
    if newer_slot == 0:
        nvme.tier.remove([a])
        spill(nvme.tier, [key])
    else:
        spill(nvme.tier, [d, key])  # two pages go to two consecutive free slots
    assert nvme.find(key).slot == newer_slot
    load(restart_without_journal(nvme), [key])


def test_every_page_is_pending_when_the_marks_are_lost(nvme: Disk) -> None:
    keys = chain("acknowledged", 5).keys()
    spill(nvme.tier, keys)
    waiting = [page.key for page in restart_without_journal(nvme).pending()]
    assert sorted(waiting) == sorted(keys)


def test_order_by_age_survives_the_loss_of_the_journal(tmp_path: Path) -> None:
    with disk(tmp_path / "nvme", capacity=capacity_for(32)) as nvme:
        old, young = chain("old", 16), chain("young", 16)
        spill(nvme.tier, old.keys())
        spill(nvme.tier, young.keys())
        tier = restart_without_journal(nvme)
        tier.mark_uploaded([*old.keys(), *young.keys()])  # without a journal, all pages are pending
        spill(tier, chain("new", 12).keys())
        assert nvme.tier.lookup(young, soon()) == (16, True)
        assert nvme.tier.lookup(old, soon()) == (4, True)


@pytest.mark.parametrize("with_journal", [True, False])
def test_pages_of_truncated_and_lost_segments_are_misses(
    tmp_path: Path, with_journal: bool
) -> None:
    with disk(tmp_path / "nvme", capacity=capacity_for(64)) as nvme:
        keys = chain("chain", 12).keys()
        spill(nvme.tier, keys)  # fills three segments of four slots
        nvme.kill()
        if not with_journal:
            nvme.journal.unlink()
        cut, lost, _ = nvme.segments()
        size = cut.stat().st_size
        with cut.open("r+b") as file:
            file.truncate(4096 + 2 * SLOT + 100)
        lost.unlink()
        tier = nvme.open()
        kept = [True] * 2 + [False] * 6 + [True] * 4
        assert present(tier, keys) == kept
        assert cut.stat().st_size == size
        load(tier, [key for key, there in zip(keys, kept, strict=True) if there])
        assert spill(tier, keys).count(SpillResult.STORED) == 6
        load(nvme.reopen(), keys)


def test_pages_return_with_a_segment_that_could_not_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another segment is lost. Pages stored in the meantime do not take the returning slots."""
    with disk(tmp_path / "nvme", capacity=capacity_for(64)) as nvme:
        keys, more = chain("chain", 12).keys(), chain("more", 12).keys()
        spill(nvme.tier, keys)  # fills three segments of four slots
        nvme.tier.mark_pending(keys)
        nvme.tier.close()
        sick, _, lost = nvme.segments()
        lost.unlink()
        real = os.open

        def fail_sick(path: str, *args: Any, **kwargs: Any) -> int:
            if path == sick.name:
                raise OSError(errno.EIO, "broken")
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", fail_sick)
        tier = nvme.open()
        assert present(tier, keys) == [False] * 4 + [True] * 4 + [False] * 4
        spill(tier, more)
        monkeypatch.undo()
        tier = nvme.reopen()
        assert [page.key for page in tier.pending()] == keys[:8]
        load(tier, [*keys[:8], *more])
        assert tier.usage().pages == 20
        assert tier.check_integrity() == []


def test_truncated_segment_serves_its_remaining_pages_on_a_full_disk(
    nvme: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = chain("chain", 8).keys()
    spill(nvme.tier, keys)
    nvme.tier.close()
    with nvme.segments()[0].open("r+b") as file:
        file.truncate(4096 + 3 * SLOT)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    for call in ("posix_fallocate", "pwrite"):
        monkeypatch.setattr(os, call, fail)
    load(nvme.open(), keys[:3])
    monkeypatch.undo()
    spill(nvme.reopen(), keys)
    load(nvme.reopen(), keys)


def test_segment_truncated_while_open_gives_no_wrong_page(nvme: Disk) -> None:
    keys = chain("chain", 8).keys()
    spill(nvme.tier, keys)
    with nvme.segments()[0].open("r+b") as file:
        file.truncate(4096 + 3 * SLOT)
    pages = [make_page(key, (4096, 4096), filled=False) for key in keys]
    results = nvme.tier.load(pages, soon())
    assert results == [LoadResult.LOADED] * 3 + [LoadResult.CORRUPT] * 5
    spill(nvme.tier, keys)
    load(nvme.tier, keys)


def test_unknown_and_damaged_files_are_kept(nvme: Disk, caplog: pytest.LogCaptureFixture) -> None:
    keys = chain("chain", 3).keys()
    spill(nvme.tier, keys)
    nvme.tier.close()
    foreign = [
        nvme.path / "notes.txt",
        nvme.path / "segments" / "backup.tar",
        nvme.path / "segments" / "00000777.seg",
        nvme.path / "namespaces" / "odd.json",
    ]
    for path in foreign:
        path.write_bytes(b"mine")
    shutil.copy(nvme.segments()[0], nvme.path / "segments" / "00000900.seg")
    caplog.set_level(logging.WARNING)
    tier = nvme.open()
    load(tier, keys)
    assert tier.namespaces() == {}
    spill(tier, chain("more", 3).keys())
    assert all(path.read_bytes() == b"mine" for path in foreign)
    logged = [str(getattr(record, "fields", "")) for record in caplog.records]
    assert all(sum(path.name in line for line in logged) == 1 for path in foreign[:3])


@pytest.mark.parametrize("name", ["99999999.seg", "00000001.seg"])
def test_segments_created_next_to_an_unknown_file_are_reopened(nvme: Disk, name: str) -> None:
    nvme.tier.close()
    foreign = nvme.path / "segments" / name
    foreign.write_bytes(b"mine")
    tier = nvme.open()
    keys = chain("chain", 12).keys()
    spill(tier, keys)  # creates three segments
    load(nvme.reopen(), keys)
    assert foreign.read_bytes() == b"mine"


def test_unfinished_files_are_removed_after_a_kill(nvme: Disk) -> None:
    spill(nvme.tier, chain("chain", 3).keys())
    nvme.tier.close()
    left = [nvme.path / "segments" / "00000001.seg.new", nvme.path / "journal.new"]
    for path in left:
        path.write_bytes(b"half")
    load(nvme.open(), chain("chain", 3).keys())
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize(
    "name", ["segments/00000001.seg.new", "segments/.direct-io-probe", "journal.new"]
)
def test_directories_named_like_unfinished_files_are_kept(
    nvme: Disk, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    keys, more = chain("chain", 4).keys(), chain("more", 4).keys()
    nvme.reopen(capacity=capacity_for(64))
    spill(nvme.tier, keys)
    nvme.tier.close()
    foreign = nvme.path / name
    foreign.mkdir()
    tier = nvme.open()
    assert sum(foreign.name in str(getattr(r, "fields", "")) for r in caplog.records) == 1
    spill(tier, more)  # goes to another segment
    load(nvme.reopen(), [*keys, *more])
    assert foreign.is_dir()


def test_compaction_runs_during_changes(nvme: Disk) -> None:
    """Compact repeatedly while other threads spill, remove and mark pages."""
    kept: dict[PageKey, bool] = {}
    done = threading.Event()
    errors: list[BaseException] = []

    def change() -> None:
        try:
            for turn in range(60):
                keys = chain(f"turn {turn}", 12).keys()
                assert spill(nvme.tier, keys) == [SpillResult.STORED] * 12
                nvme.tier.mark_pending(keys[::2])
                nvme.tier.mark_uploaded(keys[::4])
                nvme.tier.remove(keys[turn % 5 :])
                assert spill(nvme.tier, keys[8:]) == [SpillResult.STORED] * 4
                kept.update(dict.fromkeys(keys, False))
                kept.update(dict.fromkeys([*keys[: turn % 5], *keys[8:]], True))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    worker = threading.Thread(target=change)
    worker.start()
    compactions = 0
    while not done.is_set() or compactions == 0:
        nvme.tier._catalog.compact()
        compactions += 1
    worker.join()
    assert errors == []
    waiting = [page.key for page in nvme.tier.pending()]
    nvme.kill()
    tier = nvme.open()
    assert present(tier, list(kept)) == list(kept.values())
    assert sorted(page.key for page in tier.pending()) == sorted(waiting)
    load(tier, [key for key, there in kept.items() if there])
    assert tier.check_integrity() == []


def test_changes_during_compaction_are_kept(nvme: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all kinds of changes between the snapshot and the switch to the new journal."""
    old, new = chain("old", 8).keys(), chain("new", 8).keys()
    spill(nvme.tier, old)
    nvme.tier.mark_pending(old[:4])
    sync = Journal.sync

    def change(journal: Journal) -> None:
        spill(nvme.tier, new)
        nvme.tier.remove(old[2:6])
        nvme.tier.mark_pending(new[:2])
        nvme.tier.mark_uploaded(old[:1])
        sync(journal)

    monkeypatch.setattr(Journal, "sync", change)
    nvme.tier._catalog.compact()
    monkeypatch.undo()
    nvme.tier.remove(old[7:])
    nvme.kill()
    tier = nvme.open()
    assert present(tier, old) == [True] * 2 + [False] * 4 + [True, False]
    assert [page.key for page in tier.pending()] == [old[1], *new[:2]]
    load(tier, [*old[:2], old[6], *new])


def test_failed_compaction_changes_nothing(nvme: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = chain("chain", 8).keys()
    spill(nvme.tier, keys[:4])

    def fail(journal: Journal) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(Journal, "sync", fail)
    with pytest.raises(OSError, match="broken"):
        nvme.tier._catalog.compact()
    assert not (nvme.path / "journal.new").exists()
    spill(nvme.tier, keys[4:])
    nvme.kill()  # closing the tier fails to compact the journal as well
    monkeypatch.undo()
    load(nvme.open(), keys)


def test_journal_is_bounded(nvme: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memkv_sglang.tiers.nvme.budget.SMALLEST_JOURNAL", 20_000)
    nvme.reopen()
    keys = chain("chain", 20).keys()
    for _ in range(100):
        spill(nvme.tier, keys)
        nvme.tier.remove(keys)
    written = 100 * 20 * (72 + 8)
    spill(nvme.tier, keys)
    nvme.tier._housekeeper.close()
    assert nvme.journal.stat().st_size < written / 2
    nvme.kill()
    load(nvme.open(), keys)


def test_journal_restores_a_hundred_thousand_entries(tmp_path: Path) -> None:
    count, per_segment = 100_000, 12_500
    folder = Folder.at(tmp_path)
    segments = Segments(folder, 1 << 40, 1 << 30, direct=False)
    for number in range(count // per_segment):
        segments.add(create_segment(folder, number, 8192, per_segment, direct=False))
    written = Catalog(segments)
    written.start_journal(folder)
    keys = Chain(NAMESPACE.digest, make_hashes(count)).keys()
    for first in range(0, count, 1000):
        written.publish(
            [
                NewPage(keys[i], Place(place.segment, place.slot), 4000, count - i)
                for i, place in enumerate(written.reserve(8192, 1000), first)
            ]
        )
    written.drop_keys(keys[::10])
    written.mark(keys[5::1000], pending=True)
    places = {key: written.describe(key) for key in keys}
    written.journal.close()
    segments.close()

    reopened = Segments(folder, 1 << 40, 1 << 30, direct=False)
    reopened.open_all()
    read = Catalog(reopened)
    recover(read, folder)
    assert {key: read.describe(key) for key in keys} == places
    assert sum(description is None for description in places.values()) == count // 10
    assert [page.key for page in read.pending_pages()] == keys[5::1000]
    oldest = min(read.index, key=read.order.tick)
    assert read.index.key(oldest) == keys[-1]
    read.journal.close()
    reopened.close()
    folder.close()
