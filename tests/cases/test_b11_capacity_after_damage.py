"""All files below the directory fit into the capacity, whatever was damaged."""

import errno
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memkv_sglang.config.schema import KIB, MIB
from memkv_sglang.page import PageKey
from memkv_sglang.testing.conformance import load, spill
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import SpillResult, TierError
from memkv_sglang.tiers.nvme import NvmeTier
from tests.cases.disk_agents import PAGES, agent, chains, disk_usage
from tests.tiers.nvme.nvme_support import Disk, disk

CAPACITY = 16 * MIB
SEGMENT = MIB
STORED, REFUSED = SpillResult.STORED, SpillResult.REFUSED


def keys(name: str, count: int = 64) -> list[PageKey]:
    return make_chain(make_namespace(), count, name).keys()


def fill(nvme: Disk, name: str) -> list[PageKey]:
    """Fill the disk by storing more than fits; return the keys of the last pages."""
    for turn in range(CAPACITY // (64 * 12 * KIB) + 4):
        last = keys(f"{name} {turn}")
        spill(nvme.tier, last)
        assert disk_usage(nvme.path) <= CAPACITY
    return last


def overwrite(path: Path, content: bytes, offset: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def zero_header(path: Path) -> None:
    overwrite(path, bytes(4096))


def garble_header(path: Path) -> None:
    overwrite(path, os.urandom(4096))


def flip_in_header(path: Path) -> None:
    overwrite(path, b"\xff", 17)


@pytest.mark.parametrize(
    "lose",
    [
        flip_in_header,
        pytest.param(zero_header, marks=pytest.mark.slow),
        pytest.param(garble_header, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("with_journal", [True, False])
def test_pages_stay_when_headers_are_lost(
    tmp_path: Path, lose: Callable[[Path], None], with_journal: bool
) -> None:
    with disk(tmp_path / "nvme", capacity=CAPACITY, segment_size=SEGMENT) as nvme:
        last = fill(nvme, "first")
        for turn in range(3):
            nvme.kill()
            for path in nvme.segments():
                lose(path)
            if not with_journal:
                nvme.journal.unlink()
            tier = nvme.open()
            load(tier, last)
            assert tier.check_integrity() == []
            # Pages waiting for upload cannot be evicted.
            tier.mark_uploaded([page.key for page in tier.pending()])
            last = fill(nvme, str(turn))


def test_unrecognizable_segments_count(tmp_path: Path) -> None:
    """Nothing in these files identifies them as ours, so they stay and take up capacity."""
    with disk(tmp_path / "nvme", capacity=CAPACITY, segment_size=SEGMENT) as nvme:
        garbage = os.urandom(SEGMENT)
        for turn in range(3):
            fill(nvme, str(turn))
            nvme.kill()
            for path in nvme.segments()[:4]:
                path.write_bytes(garbage)
            left = [path for path in nvme.segments() if path.read_bytes() == garbage]
            assert len(left) == 4
            nvme.open()
            assert disk_usage(nvme.path) <= CAPACITY
            last = fill(nvme, f"{turn} again")
            load(nvme.tier, last)
            assert all(path.read_bytes() == garbage for path in left)


def test_a_directory_full_of_foreign_segments_takes_nothing_more(tmp_path: Path) -> None:
    with disk(tmp_path / "nvme", capacity=CAPACITY, segment_size=SEGMENT) as nvme:
        nvme.tier.close()
        for number in range(16):
            path = nvme.path / "segments" / f"{number:08}.seg"
            path.write_bytes(os.urandom(SEGMENT))
        tier = nvme.open()
        assert set(spill(tier, keys("refused"))) == {REFUSED}
        assert disk_usage(nvme.path) <= CAPACITY + 64 * KIB
        for path in nvme.segments():
            path.unlink()
        load(nvme.reopen(), [])
        assert set(spill(nvme.tier, keys("stored"))) == {STORED}


@pytest.mark.parametrize("size", [0, 100, 4096, SEGMENT])
@pytest.mark.parametrize("sparse", [True, False])
def test_segments_of_zeros_are_removed(tmp_path: Path, size: int, sparse: bool) -> None:
    """A power failure before anything was written leaves files like these."""
    with disk(tmp_path / "nvme", capacity=CAPACITY, segment_size=SEGMENT) as nvme:
        nvme.tier.close()
        path = nvme.path / "segments" / "00000005.seg"
        if sparse:
            path.touch()
            os.truncate(path, size)
        else:
            path.write_bytes(bytes(size))
        nvme.open()
        assert not path.exists()


def test_a_huge_sparse_segment_costs_nothing(tmp_path: Path) -> None:
    with disk(tmp_path / "nvme", capacity=CAPACITY, segment_size=SEGMENT) as nvme:
        nvme.tier.close()
        path = nvme.path / "segments" / "00000005.seg"
        path.write_bytes(b"foreign")
        os.truncate(path, 1 << 40)
        nvme.open()
        assert path.exists()
        load(nvme.tier, fill(nvme, "pages"))


def test_files_of_others_do_not_count(tmp_path: Path) -> None:
    with disk(tmp_path / "nvme", capacity=CAPACITY, segment_size=SEGMENT) as nvme:
        last = fill(nvme, "pages")
        held, pages = nvme.tier._segments.total, nvme.tier.usage().pages
        names = "notes", "segments/backup.tar", "namespaces/odd", "quarantine/odd", "segments/1.seg"
        for name in names:
            (nvme.path / name).write_bytes(bytes(CAPACITY))
        (nvme.path / "segments" / "00000900.seg").mkdir()
        nvme.reopen()
        assert (nvme.tier._segments.total, nvme.tier.usage().pages) == (held, pages)
        load(nvme.tier, last)
        assert all((nvme.path / name).stat().st_size == CAPACITY for name in names)


def test_a_grown_segment_is_cut(tmp_path: Path) -> None:
    with disk(tmp_path / "nvme", capacity=CAPACITY, segment_size=SEGMENT) as nvme:
        last = fill(nvme, "pages")
        nvme.tier.close()
        for path in nvme.segments():
            with path.open("ab") as file:
                file.write(os.urandom(SEGMENT))
        load(nvme.open(), last)
        assert disk_usage(nvme.path) <= CAPACITY


def test_segments_that_cannot_be_opened_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk(tmp_path / "nvme", capacity=CAPACITY, segment_size=SEGMENT) as nvme:
        kept = fill(nvme, "pages")
        kept = [key for key in kept if nvme.find(key).segment == nvme.find(kept[0]).segment]
        sick = f"{nvme.find(kept[0]).segment:08}.seg"
        nvme.tier.close()
        real = os.open

        def fail_sick(path: str, *args: Any, **kwargs: Any) -> int:
            if path == sick:
                raise OSError(errno.EIO, "broken")
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", fail_sick)
        nvme.open()
        for turn in range(3):
            fill(nvme, f"{turn} without")
            nvme.reopen()
        monkeypatch.undo()
        load(nvme.reopen(), kept)
        assert disk_usage(nvme.path) <= CAPACITY


def test_few_descriptors(tmp_path: Path) -> None:
    """An agent that cannot open all segments stays within its capacity and loses none of them."""
    path, size = tmp_path / "nvme", "1MiB"
    before, meanwhile = chains("before", 60), chains("meanwhile", 60)
    with agent(tmp_path / "a", path, segment_size=size) as first:
        assert all(first.spill(chain) == {STORED} for chain in before)
        there = sum(first.loaded(chain) for chain in before)
        first.terminate()
    with agent(tmp_path / "a", path, descriptors=40, segment_size=size) as second:
        found = sum(second.loaded(chain) for chain in before)
        assert 0 < found < there
        for chain in meanwhile:
            assert second.spill(chain) <= {STORED, REFUSED}
            assert disk_usage(path) <= 32 * MIB
        assert second.loaded(meanwhile[-1]) == PAGES
        second.kill()
    assert "Too many open files" in (tmp_path / "a" / "log").read_text()
    with agent(tmp_path / "a", path, segment_size=size) as third:
        assert third.loaded(meanwhile[-1]) == PAGES
        assert sum(third.loaded(chain) for chain in before) > 0
        assert disk_usage(path) <= 32 * MIB


def test_descriptions_are_bounded(tmp_path: Path) -> None:
    with disk(tmp_path / "nvme", capacity=CAPACITY, segment_size=SEGMENT) as nvme:
        used = make_namespace(revision="used")
        nvme.tier.describe(used)
        spill(nvme.tier, make_chain(used, 4).keys())
        for number in range(300):
            nvme.tier.describe(make_namespace(revision=f"{number}"))
        described = nvme.tier.namespaces()
        assert used.digest in described
        assert make_namespace(revision="299").digest in described
        assert disk_usage(nvme.path / "namespaces") <= CAPACITY // 64
        # Each of these namespaces has a page, so its description must stay.
        for number in range(100):
            namespace = make_namespace(revision=f"{number}")
            try:
                nvme.tier.describe(namespace)
            except TierError as error:
                assert "too many descriptions" in str(error)
                break
            spill(nvme.tier, make_chain(namespace, 1).keys())
        else:
            pytest.fail("the limit was not met")
        load(nvme.tier, make_chain(used, 4).keys())


def test_quarantine_is_bounded_in_bytes_and_after_the_capacity_was_lowered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with disk(tmp_path / "nvme", capacity=CAPACITY, segment_size=SEGMENT) as nvme:
        chain = keys("pages", 40)
        spill(nvme.tier, chain)
        for key in chain:
            nvme.flip(key)
        nvme.tier.verify(True, lambda done, total: None)
        copies = nvme.quarantined()
        assert 0 < len(copies) < 16
        assert disk_usage(nvme.path / "quarantine") <= CAPACITY // 128
        caplog.set_level(logging.WARNING)
        nvme.reopen(capacity=2 * MIB)
        assert set(nvme.quarantined()) < set(copies)
        assert disk_usage(nvme.path / "quarantine") <= 32 * KIB
        assert "copies of corrupt pages removed" in [r.message for r in caplog.records]


def _damage(nvme: Disk, chance: random.Random) -> None:
    """Damage a closed directory in one of many ways."""
    segments = nvme.segments()
    path = chance.choice(segments)
    match chance.randrange(9):
        case 0:
            zero_header(path)
        case 1:
            garble_header(path)
        case 2:
            os.truncate(path, chance.randrange(path.stat().st_size))
        case 3:
            with path.open("ab") as file:
                file.write(chance.randbytes(chance.randrange(SEGMENT)))
        case 4:
            path.unlink()
        case 5:
            shutil.copy(path, path.with_name("00000077.seg"))
        case 6:
            nvme.journal.unlink()
        case 7:
            os.truncate(nvme.journal, chance.randrange(nvme.journal.stat().st_size))
        case _:
            for name in ("journal.new", "format.new", "segments/00000099.seg.new"):
                (nvme.path / name).write_bytes(chance.randbytes(SEGMENT))


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_the_capacity_holds_under_traffic_and_damage(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    sizes = [(4096,), (4096, 4096), (60 * KIB,)]
    with disk(tmp_path / "nvme", capacity=CAPACITY, segment_size=SEGMENT) as nvme:
        stored = 0
        for turn in range(24):
            for batch in range(6):
                name, size = f"{turn} {batch}", chance.choice(sizes)
                results = spill(nvme.tier, keys(name), size)
                stored += results.count(STORED)
                nvme.tier.mark_pending(keys(name)[:8])
                assert disk_usage(nvme.path) <= CAPACITY
            nvme.tier.mark_uploaded([page.key for page in nvme.tier.pending()])
            nvme.kill() if chance.random() < 0.5 else nvme.tier.close()
            _damage(nvme, chance)
            tier: NvmeTier = nvme.open()
            tier.mark_uploaded([page.key for page in tier.pending()])
            assert tier.check_integrity() == []
            assert tier.verify(True, lambda done, total: None).disagreements == []
            (nvme.path / "segments" / "00000077.seg").unlink(missing_ok=True)
        assert stored > 20 * 6 * 64 * 0.8
        last = keys("last")
        assert set(spill(nvme.tier, last)) == {STORED}
        load(nvme.reopen(), last)
