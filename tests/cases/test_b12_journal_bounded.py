"""The journal stays short and keeps the records of segments that cannot be opened."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memkv_sglang.config.schema import KIB, MIB
from memkv_sglang.page import PageKey
from memkv_sglang.testing.conformance import load, spill
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.nvme.budget import divide
from memkv_sglang.tiers.nvme.journal import MAX_PAYLOAD, Kind
from tests.tiers.nvme.nvme_support import Disk, disk, present

CAPACITY, SEGMENT = 8 * MIB, MIB
NAMESPACE = make_namespace()
SNAPSHOT = CAPACITY // (12 * KIB) * 80
"""Bytes of a journal that describes a full disk, including marks."""
LONGEST = max(5 * SNAPSHOT, 2 * divide(CAPACITY).journal)
"""The journal is rewritten at four times its shortest length, while traffic goes on."""


def keys(name: str, count: int = 32) -> list[PageKey]:
    return make_chain(NAMESPACE, count, name).keys()


@pytest.fixture
def nvme(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path / "nvme", capacity=CAPACITY, segment_size=SEGMENT) as opened:
        yield opened


@pytest.fixture
def sick(nvme: Disk, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the first segment impossible to open; return a function that undoes it."""
    real, name = os.open, "00000000.seg"

    def fail(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == name:
            raise OSError(errno.EIO, "broken")
        return real(path, *args, **kwargs)

    spill(nvme.tier, OURS)
    assert {nvme.find(key).segment for key in OURS} == {0}
    nvme.tier.mark_pending(OURS[:5])
    nvme.tier.close()
    monkeypatch.setattr(os, "open", fail)
    nvme.open()
    assert not any(present(nvme.tier, OURS))
    return monkeypatch.undo


OURS = keys("ours", 20)


def test_traffic_while_a_segment_cannot_be_opened(nvme: Disk, sick: Callable[[], None]) -> None:
    longest = 0
    for turn in range(250):
        spill(nvme.tier, keys(f"{turn}"))
        nvme.tier.mark_pending(keys(f"{turn}")[:8])
        nvme.tier.mark_uploaded(keys(f"{turn}")[:8])
        longest = max(longest, nvme.journal.stat().st_size)
        if turn % 100 == 99:
            nvme.reopen()
            assert nvme.journal.stat().st_size <= SNAPSHOT
    assert longest <= LONGEST
    sick()
    tier = nvme.reopen()
    load(tier, OURS)
    assert [page.key for page in tier.pending()] == OURS[:5]
    assert tier.check_integrity() == []


def test_the_journal_is_rewritten_after_a_kill_too(nvme: Disk, sick: Callable[[], None]) -> None:
    for turn in range(40):
        spill(nvme.tier, keys(f"{turn}"))
        if turn % 10 == 9:
            nvme.kill()
            nvme.open()
    nvme.tier._catalog.compact()
    nvme.kill()
    sick()
    load(nvme.open(), OURS)


def test_pages_removed_meanwhile_stay_removed(nvme: Disk, sick: Callable[[], None]) -> None:
    assert nvme.tier.remove(OURS[:3]) == 3
    nvme.reopen()
    assert nvme.tier.remove(OURS[:3]) == 0
    sick()
    assert present(nvme.reopen(), OURS) == [False] * 3 + [True] * 17
    assert nvme.tier.check_integrity() == []


@pytest.mark.parametrize("kill", [True, False])
def test_namespaces_cleared_meanwhile_stay_cleared(
    nvme: Disk, sick: Callable[[], None], kill: bool
) -> None:
    other = make_chain(make_namespace(revision="other"), 4)
    spill(nvme.tier, other.keys())
    assert nvme.tier.clear(NAMESPACE.digest) == 20
    if kill:
        nvme.kill()
    else:
        nvme.tier.close()
    sick()
    assert not any(present(nvme.open(), OURS))
    load(nvme.tier, other.keys())


def test_pages_stored_again_meanwhile_count(nvme: Disk, sick: Callable[[], None]) -> None:
    spill(nvme.tier, OURS)
    nvme.tier.mark_pending(OURS[10:])
    nvme.reopen()
    nvme.flip(OURS[0])  # damages the newer copy; nothing has stored the page again since
    place = nvme.find(OURS[0])
    sick()
    nvme.reopen()
    assert nvme.find(OURS[0]).segment == place.segment != 0
    load(nvme.tier, OURS[1:])
    assert nvme.tier.usage().pages == 20
    assert nvme.tier.check_integrity() == []


def test_a_segment_that_vanished_is_forgotten(nvme: Disk, sick: Callable[[], None]) -> None:
    sick()
    nvme.tier.close()
    nvme.segments()[0].unlink()
    tier = nvme.open()
    assert not any(present(tier, OURS))
    assert len(tier._catalog.absent) == 0
    spill(tier, OURS)
    load(nvme.reopen(), OURS)


def test_a_journal_that_cannot_be_opened_now_is_not_written_over(
    nvme: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is intact and records pages that wait for upload; only descriptors or permissions
    are lacking.
    """
    spill(nvme.tier, OURS)
    nvme.tier.mark_pending(OURS[:2])
    nvme.tier.close()
    before = nvme.journal.read_bytes()
    real = os.open

    def fail(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == "journal":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(ValueError, match="raise the limit of open files"):
            nvme.open()
    assert nvme.journal.read_bytes() == before
    assert [page.key for page in nvme.open().pending()] == OURS[:2]


def test_a_journal_truncated_in_its_snapshot_is_rebuilt(nvme: Disk) -> None:
    """The snapshot was synced, so a shorter file is damaged."""
    spill(nvme.tier, OURS)
    nvme.tier.close()
    whole = nvme.journal.read_bytes()
    for size in range(0, len(whole), 97):
        nvme.journal.write_bytes(whole[:size])
        load(nvme.open(), OURS)
        nvme.tier.close()


def test_a_large_batch_is_read_back(nvme: Disk) -> None:
    """More records than fit in one frame, as when thousands of pages are queued at once."""
    nvme.reopen(capacity=64 * MIB, segment_size=32 * MIB)
    sizes = (100,)
    stored = [key for turn in range(6) for key in keys(f"{turn}", 1000)]
    for first in range(0, len(stored), 1000):
        spill(nvme.tier, stored[first : first + 1000], sizes)
    catalog = nvme.tier._catalog
    records = b"".join(map(catalog._slot_record, catalog.index)) * 30
    assert len(records) > MAX_PAYLOAD
    catalog.journal.append(Kind.PENDING, records)
    nvme.kill()
    tier = nvme.open()
    assert len(list(tier.pending())) == tier.usage().pages > 5000
