"""Reading the disk is bounded, even for files with valid checksums and odd values.

Whatever the values, a tier opens, is consistent, serves no wrong page and stores new ones.
"""

import contextlib
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memkv_testbed.fuzz import MEMORY

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MIB, NvmeConfig
from memkv_sglang.page import PageKey
from memkv_sglang.testing.conformance import soon, spill
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.nvme import NvmeTier
from memkv_sglang.tiers.nvme.journal import PUT, SLOT
from tests.cases.disk_agents import disk_usage

CAPACITY = MIB
SIZE = (100,)
SLOT_SIZE = 8192
NAMESPACE = make_namespace()
KEYS = make_chain(NAMESPACE, 12).keys()
NEW = make_chain(NAMESPACE, 3, "new").keys()
FUZZ = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])

edges = sorted({1 << n for n in range(64)} | {(1 << n) - 1 for n in range(65)} | {4096 * 3})


def integers(bits: int, *likely: int) -> st.SearchStrategy[int]:
    """Return integers of that many bits: small ones, and ones near powers of two."""
    odd = [edge for edge in edges if edge < 1 << bits]
    return st.sampled_from(likely) | st.sampled_from(odd) | st.integers(0, (1 << bits) - 1)


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """Return, in memory, the files of a directory with twelve pages in two or more segments."""
    with tempfile.TemporaryDirectory(prefix="memkv-fuzz-", dir=MEMORY) as home:
        tier = open_tier(Path(home) / "nvme")
        tier.describe(NAMESPACE)
        spill(tier, KEYS, SIZE)
        tier.mark_pending(KEYS[:4])
        tier.close()
        yield Path(home) / "nvme"


def open_tier(path: Path) -> NvmeTier:
    return NvmeTier(NvmeConfig(directory=str(path), capacity=CAPACITY, direct_io="never"))


@contextmanager
def copy_of(template: Path) -> Iterator[Path]:
    path = template.with_name("copy")
    shutil.copytree(template, path)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def check(path: Path) -> None:
    """Open the directory twice and use it."""
    for _ in range(2):
        tier = open_tier(path)
        try:
            assert tier.check_integrity() == []
            pages = [make_page(key, SIZE, filled=False) for key in KEYS]
            results = tier.load(pages, soon())
            loaded = [
                page
                for page, result in zip(pages, results, strict=True)
                if result is LoadResult.LOADED
            ]
            assert all(map(holds_content, loaded))
            assert set(results) <= {LoadResult.LOADED, LoadResult.MISSING, LoadResult.CORRUPT}
            tier.namespaces()
            tier.mark_uploaded([page.key for page in tier.pending()])
            new = [make_page(key, SIZE, filled=True) for key in NEW]
            assert set(tier.spill(new, soon())) <= {SpillResult.STORED, SpillResult.PRESENT}
            assert disk_usage(path) <= CAPACITY
            assert tier.check_integrity() == []
        finally:
            tier.close()


# Journals

keys = st.sampled_from(KEYS) | st.builds(
    PageKey, st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32)
)
segments, slots = integers(32, 0, 1, 2, 7), integers(32, 0, 1, 2, 3, 4, 5, 6)
puts = st.builds(
    lambda key, *fields: PUT.pack(*key, *fields),
    keys,
    segments,
    slots,
    integers(64, 100, 0, 4096, 4097),
    integers(64, 1, 2, 3),
)
places = st.builds(SLOT.pack, segments, slots)
records = st.lists(puts, max_size=6).map(b"".join)
marks = st.lists(places, max_size=6).map(b"".join)
honest = st.tuples(st.just(1), records) | st.tuples(st.sampled_from([2, 3, 4]), marks)
odd = st.tuples(integers(8, 0, 1, 2, 3, 4, 5), records | marks | st.binary(max_size=100))
frames = st.lists(honest | odd, max_size=8)


def frame(kind: int, payload: bytes, length: int | None = None) -> bytes:
    head = struct.pack("<4sB3xQ", b"MKVJ", kind, len(payload) if length is None else length)
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head + payload)) + payload


@FUZZ
@given(frames, st.booleans(), st.booleans())
def test_journals(
    template: Path, added: list[tuple[int, bytes]], keep: bool, unopenable: bool
) -> None:
    with copy_of(template) as path:
        before = (path / "journal").read_bytes() if keep else frame(0, b"") + frame(5, b"")
        (path / "journal").write_bytes(before + b"".join(frame(*each) for each in added))
        if unopenable:
            segment = path / "segments" / "00000001.seg"
            segment.unlink()
            segment.symlink_to(segment.name)
        check(path)


@FUZZ
@given(integers(64, 0, 72, 1 << 20), st.binary(max_size=200))
def test_journal_lengths(template: Path, length: int, payload: bytes) -> None:
    with copy_of(template) as path:
        with (path / "journal").open("ab") as file:
            file.write(frame(1, payload, length))
        check(path)


@pytest.mark.parametrize("size", [1 << 30, 1 << 40])
def test_a_huge_sparse_journal(template: Path, size: int) -> None:
    with copy_of(template) as path:
        with (path / "journal").open("ab") as file:
            file.truncate(size)
        check(path)


# Segments


def header(number: int, slot_size: int, slots: int, version: int = 1) -> bytes:
    fields = struct.pack("<8sIIQQ", b"MKVSEGM\0", version, number, slot_size, slots)
    return (fields + xxhash.xxh3_128_digest(fields)).ljust(4096, b"\0")


@FUZZ
@given(
    integers(32, 0, 1),
    integers(64, SLOT_SIZE, 4096, 0),
    integers(64, 1, 2, 6, 7),
    integers(32, 1, 1, 1, 2),
    st.integers(0, 60_000) | st.none(),
    st.booleans(),
)
def test_segment_headers(
    template: Path,
    number: int,
    slot_size: int,
    slots: int,
    version: int,
    cut: int | None,
    with_journal: bool,
) -> None:
    with copy_of(template) as path:
        with (path / "segments" / "00000000.seg").open("r+b") as file:
            file.write(header(number, slot_size, slots, version))
            if cut is not None:
                file.truncate(cut)
        if not with_journal:
            (path / "journal").unlink()
        check(path)


# Footers


def footer(length: int, sequence: int, key: PageKey, checksum: bytes, version: int) -> bytes:
    fields = struct.pack(
        "<8sI4xQQ16s32s16s", b"MKVPAGE\0", version, length, sequence, *key, checksum
    )
    return (fields + xxhash.xxh3_128_digest(fields)).ljust(4096, b"\0")


@FUZZ
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.builds(
                footer,
                integers(64, 100, 0, 4096, 4097),
                integers(64, 1, 2, 3),
                keys,
                st.binary(min_size=16, max_size=16),
                integers(32, 1, 1, 1, 2),
            ),
        ),
        max_size=4,
    ),
    st.booleans(),
    st.booleans(),
)
def test_footers(
    template: Path, written: list[tuple[int, bytes]], with_journal: bool, with_header: bool
) -> None:
    with copy_of(template) as path:
        with (path / "segments" / "00000000.seg").open("r+b") as file:
            if not with_header:
                file.write(bytes(4096))
            for slot, content in written:
                file.seek(4096 + (slot + 1) * SLOT_SIZE - 4096)
                file.write(content)
        if not with_journal:
            (path / "journal").unlink()
        check(path)


# Small files

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
known = msgspec.json.decode(NAMESPACE.description)


@FUZZ
@given(st.dictionaries(st.sampled_from(sorted(known)) | st.text(max_size=5), values, max_size=4))
def test_descriptions(template: Path, changed: dict[str, object]) -> None:
    with copy_of(template) as path:
        file = path / "namespaces" / f"{NAMESPACE.digest.hex()}.json"
        with contextlib.suppress(msgspec.MsgspecError, OverflowError, ValueError):
            file.write_bytes(msgspec.json.encode({**known, **changed}))
        check(path)
        tier = open_tier(path)
        tier.describe(NAMESPACE)
        assert tier.namespaces() == {NAMESPACE.digest: NAMESPACE}
        tier.close()


@FUZZ
@given(st.binary(max_size=80) | st.from_regex(rb"memkv nvme \d{0,30}\n?", fullmatch=True))
def test_formats(template: Path, content: bytes) -> None:
    with copy_of(template) as path:
        (path / "format").write_bytes(content)
        try:
            check(path)
        except ConfigError as error:
            assert "\n" not in str(error)
            assert (path / "format").read_bytes() == content
