"""Verification and inspection of a directory."""

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from memkv_sglang.page import PageKey
from memkv_sglang.testing.conformance import load, spill
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import PendingUploads, TierError
from memkv_sglang.tiers.nvme import VerifyReport
from tests.tiers.nvme.nvme_support import SLOT, Disk, disk, present

NAMESPACE = make_namespace()
KEYS = make_chain(NAMESPACE, 100).keys()


@pytest.fixture
def nvme(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path / "nvme", queue_depth=2) as opened:
        opened.tier.describe(NAMESPACE)
        spill(opened.tier, KEYS)
        yield opened


def verify(nvme: Disk, *, repair: bool = False) -> VerifyReport:
    return nvme.tier.verify(repair, lambda done, total: None)


def test_clean_directory(nvme: Disk) -> None:
    steps: list[tuple[int, int]] = []
    report = nvme.tier.verify(False, lambda done, total: steps.append((done, total)))
    assert report == VerifyReport(100, 100 * 8192, [], [], [], [], [], 0)
    assert report.is_clean
    assert steps == sorted(steps)
    assert steps[-1] == (100, 100)


# Offsets in the content and in the footer.
@pytest.mark.parametrize("offset", [0, 8191, 8192, 8192 + 24, 8192 + 60])
def test_corrupt_pages_are_reported_and_repaired(nvme: Disk, offset: int) -> None:
    bad = [KEYS[3], KEYS[50]]
    for key in bad:
        nvme.flip(key, offset)
    found = verify(nvme)
    assert sorted(found.corrupt) == sorted(map(nvme.find, bad))
    assert not found.is_clean
    assert found.repaired == 0
    assert all(present(nvme.tier, KEYS))
    assert verify(nvme, repair=True).repaired == 2
    assert [key for key in KEYS if not present(nvme.tier, [key])[0]] == bad
    assert len(nvme.quarantined()) == 2
    assert verify(nvme).is_clean
    load(nvme.reopen(), [key for key in KEYS if key not in bad])


def test_slot_that_holds_another_page_is_corrupt(nvme: Disk) -> None:
    """As with a stale index: the slot's content matches its own checksum."""
    a, b = nvme.find(KEYS[1]), nvme.find(KEYS[2])
    with nvme.segments()[0].open("r+b") as file:
        file.seek(a.offset)
        content = file.read(SLOT)
        file.seek(b.offset)
        file.write(content)
    assert verify(nvme).corrupt == [nvme.find(KEYS[2])]


def test_unreadable_pages_are_reported(nvme: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, real = nvme.find(KEYS[7]), os.preadv

    def fail_bad(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == bad.offset:
            raise OSError(errno.EIO, "bad sector")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail_bad)
    assert verify(nvme).unreadable == [bad]


def test_orphans_and_undescribed_namespaces(nvme: Disk) -> None:
    (nvme.path / "segments" / "00000500.seg").write_bytes(b"damaged")
    other = make_chain(make_namespace(model="other"), 1).keys()
    spill(nvme.tier, other)
    report = verify(nvme)
    assert report.orphans == ["00000500.seg"]
    assert report.undescribed == [other[0].namespace]
    assert report.is_clean


def test_closed_tier_cannot_be_verified(nvme: Disk) -> None:
    nvme.tier.close()
    with pytest.raises(TierError):
        verify(nvme)


def test_describe_locates_pages(nvme: Disk) -> None:
    pending_uploads: PendingUploads = nvme.tier
    pending_uploads.mark_pending(KEYS[4:5])
    other = make_chain(make_namespace(model="other"), 2).keys()
    spill(nvme.tier, other, (100,))
    pages = {key: nvme.find(key) for key in KEYS}
    assert [key for key, page in pages.items() if page.pending] == KEYS[4:5]
    assert len({(page.segment, page.slot) for page in pages.values()}) == 100
    found = nvme.find(other[1])
    assert (found.length, found.slot_size) == (100, 8192)
    assert found.offset == 4096 + found.slot * 8192
    assert nvme.tier._catalog.describe(PageKey(NAMESPACE.digest, bytes(32))) is None


def test_integrity_check_reports_inconsistencies(nvme: Disk) -> None:
    catalog = nvme.tier._catalog
    assert nvme.tier.check_integrity() == []
    entry = catalog.index.find(KEYS[0])
    assert entry is not None
    catalog.index.slots[entry] += 1
    assert len(nvme.tier.check_integrity()) == 1
    catalog.index.slots[entry] -= 1
    place = catalog.place(entry)
    catalog.segments.taken += 1
    assert len(nvme.tier.check_integrity()) == 1
    catalog.segments.taken -= 1
    place.segment.slots.free += 1
    assert len(nvme.tier.check_integrity()) == 2
    place.segment.slots.free -= 1
    assert nvme.tier.check_integrity() == []
