"""Encrypted pages in a bucket whose other writers are not trusted."""

import io
import logging
import os
import secrets
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from memkv_testbed.minio_server import MinioServer
from minio import Minio
from minio.commonconfig import CopySource

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.encryption.keys import KeyRing
from memkv_sglang.encryption.sealing import OVERHEAD, unseal
from memkv_sglang.page import Page, PageKey, page_checksum
from memkv_sglang.testing.conformance import LENGTHS, load, soon, spill
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page, page_content
from memkv_sglang.testing.state_machine import TierMachine
from memkv_sglang.tiers.base import LoadResult, SpillResult, Tier
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.forms import SealedForm
from memkv_sglang.tiers.minio.names import ObjectNames
from tests.tiers.minio import test_minio_conformance

OpenTier = Callable[[MinioConfig], MinioTier]
Metadata = dict[str, str | list[str] | tuple[str]]
NAMES = ObjectNames("")
KEYS = make_chain(make_namespace(), 3).keys()
OLD, NEW = secrets.token_hex(32), secrets.token_hex(32)


def write_keys(path: Path, write: str, keys: Iterable[tuple[str, str]]) -> str:
    lines = [f'write = "{write}"', "[keys]", *(f'{name} = "{digits}"' for name, digits in keys)]
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def sealing(minio_config: MinioConfig, tmp_path: Path) -> MinioConfig:
    """Settings of a node that encrypts."""
    return msgspec.structs.replace(
        minio_config,
        encryption_key_file=write_keys(tmp_path / "keys.toml", "old", [("old", OLD)]),
        negative_ttl=0,
    )


class TestEncryptedTier(test_minio_conformance.TestMinioTier):
    """The tier's contract, with encryption on."""

    @pytest.fixture
    def tier(self, sealing: MinioConfig, admin: Minio, open_tier: OpenTier) -> Tier:
        self.config, self.admin, self.open_tier = sealing, admin, open_tier
        return open_tier(sealing)

    def decode(self, key: PageKey, stored: bytes) -> bytes:
        content = memoryview(bytearray(len(stored) - OVERHEAD))
        unseal(bytes.fromhex(OLD), memoryview(bytearray(stored)), Page(key, (content,)))
        return bytes(content)


def test_memory_kept_for_reuse_is_bounded() -> None:
    form = SealedForm(KeyRing("old", {"old": bytes.fromhex(OLD)}))
    page = Page(KEYS[0], (memoryview(bytearray(24 << 20)),))
    with ExitStack() as pages:
        for _ in range(8):
            pages.enter_context(form.stored_page(page))
    assert 0 < sum(map(len, form._idle)) <= 128 << 20


def read(admin: Minio, bucket: str, name: str) -> tuple[bytes, Metadata]:
    response = admin.get_object(bucket, name)
    content = response.read()
    response.release_conn()
    prefix = "x-amz-meta-"
    return content, {
        field.lower().removeprefix(prefix): value
        for field, value in response.headers.items()
        if field.lower().startswith(prefix)
    }


def write(admin: Minio, bucket: str, name: str, content: bytes, metadata: Metadata) -> None:
    admin.put_object(bucket, name, io.BytesIO(content), len(content), metadata=metadata)


def plant(
    admin: Minio, bucket: str, key: PageKey, content: bytes, metadata: Metadata | None = None
) -> None:
    """Write an object like an attacker who knows the format and can write to the bucket."""
    checksum = page_checksum(key, [memoryview(content)]).hex()
    fields = {
        "memkv-format": "1",
        "memkv-length": str(len(content)),
        "memkv-checksum": checksum,
        **(metadata or {}),
    }
    write(admin, bucket, NAMES.page(key), content, fields)


def outcome(tier: Tier, key: PageKey) -> LoadResult:
    """Load a page; check the content if it is reported as loaded."""
    return tier.load([make_page(key, LENGTHS, filled=False)], soon())[0]


def test_bucket_holds_nothing_of_the_content(
    sealing: MinioConfig, admin: Minio, open_tier: OpenTier
) -> None:
    spill(open_tier(sealing), KEYS)
    for key in KEYS:
        content, metadata = read(admin, sealing.bucket, NAMES.page(key))
        plain = page_content(key, sum(LENGTHS))
        assert len(content) == len(plain) + 44
        assert all(plain[i : i + 8] not in content for i in range(0, len(plain), 8))
        told = [value for value in metadata.values() if isinstance(value, str)]
        assert page_checksum(key, [memoryview(plain)]).hex() not in told
        assert metadata["memkv-key"] == "old"


def test_page_moved_to_another_name_is_not_delivered(
    sealing: MinioConfig, admin: Minio, open_tier: OpenTier
) -> None:
    spill(open_tier(sealing), KEYS[:1])
    content, _ = read(admin, sealing.bucket, NAMES.page(KEYS[0]))
    plant(admin, sealing.bucket, KEYS[1], content, {"memkv-key": "old"})
    admin.copy_object(
        sealing.bucket,
        NAMES.page(KEYS[2]),
        CopySource(sealing.bucket, NAMES.page(KEYS[0])),
    )
    tier = open_tier(sealing)
    for key in KEYS[1:]:
        assert outcome(tier, key) == LoadResult.CORRUPT
        assert outcome(tier, key) == LoadResult.MISSING
    assert set(spill(tier, KEYS[1:])) == {SpillResult.STORED}
    load(tier, KEYS)


@pytest.mark.parametrize("metadata", [{}, {"memkv-key": "old"}, {"memkv-key": ""}], ids=str)
@pytest.mark.parametrize("padding", [0, 28])
def test_planted_page_is_not_delivered(
    sealing: MinioConfig,
    admin: Minio,
    open_tier: OpenTier,
    metadata: Metadata,
    padding: int,
) -> None:
    tier = open_tier(sealing)
    tier.check(soon())
    plant(admin, sealing.bucket, KEYS[0], bytes(sum(LENGTHS) + padding), metadata)
    assert outcome(tier, KEYS[0]) in (LoadResult.CORRUPT, LoadResult.MISSING)
    assert outcome(tier, KEYS[0]) == LoadResult.MISSING
    spill(tier, KEYS[:1])
    load(tier, KEYS[:1])


def test_changed_ciphertext_with_a_checksum_that_fits_is_not_delivered(
    sealing: MinioConfig, admin: Minio, open_tier: OpenTier
) -> None:
    spill(open_tier(sealing), KEYS)
    for key, place in zip(KEYS, (0, 5000, -1), strict=True):
        content = bytearray(read(admin, sealing.bucket, NAMES.page(key))[0])
        content[place] ^= 0x80
        plant(admin, sealing.bucket, key, bytes(content), {"memkv-key": "old"})
        assert outcome(open_tier(sealing), key) == LoadResult.CORRUPT


def test_rotation_reads_the_old_key_and_writes_the_new(
    sealing: MinioConfig, admin: Minio, open_tier: OpenTier, tmp_path: Path
) -> None:
    spill(open_tier(sealing), KEYS[:1])
    rotated = write_keys(tmp_path / "rotated.toml", "new", [("new", NEW), ("old", OLD)])
    tier = open_tier(msgspec.structs.replace(sealing, encryption_key_file=rotated))
    load(tier, KEYS[:1])
    spill(tier, KEYS[1:])
    load(tier, KEYS)
    assert read(admin, sealing.bucket, NAMES.page(KEYS[1]))[1]["memkv-key"] == "new"


@pytest.mark.parametrize("reader", ["without any key", "without this key"])
def test_page_of_an_unknown_key_is_a_miss_and_stays(
    sealing: MinioConfig,
    open_tier: OpenTier,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    reader: str,
) -> None:
    spill(open_tier(sealing), KEYS)
    other = write_keys(tmp_path / "other.toml", "new", [("new", NEW)])
    file = "" if reader == "without any key" else other
    stranger = open_tier(msgspec.structs.replace(sealing, encryption_key_file=file))
    with caplog.at_level(logging.WARNING):
        for key in KEYS:
            assert outcome(stranger, key) == LoadResult.MISSING
    [record] = caplog.records
    assert "'old', which minio.encryption_key_file" in str(vars(record))
    load(open_tier(sealing), KEYS)


def test_wrong_key_under_the_same_id_is_not_delivered(
    sealing: MinioConfig, open_tier: OpenTier, tmp_path: Path
) -> None:
    spill(open_tier(sealing), KEYS[:1])
    wrong = write_keys(tmp_path / "wrong.toml", "old", [("old", NEW)])
    tier = open_tier(msgspec.structs.replace(sealing, encryption_key_file=wrong))
    assert outcome(tier, KEYS[0]) == LoadResult.CORRUPT


def test_buffers_are_reused_and_never_shared(sealing: MinioConfig, open_tier: OpenTier) -> None:
    """Many concurrent pages of many sizes: each gets its own bytes."""
    tier = open_tier(sealing)
    for size in (1, 40_000, 7, 300_000, 4096):
        keys = make_chain(make_namespace(page_bytes=size), 24, str(size)).keys()
        spill(tier, keys, (size,))
        load(tier, keys, (size,))


class EncryptedMachine(TierMachine):
    """Random histories of a tier that encrypts and rotates its keys at each restart."""

    server: MinioServer

    def open(self) -> Tier:
        self.directory = tempfile.TemporaryDirectory()
        self.keys = [("key-0", secrets.token_hex(32))]
        self.bucket = f"machine-{uuid.uuid4().hex}"
        return self.open_rotated()

    def open_rotated(self) -> Tier:
        file = Path(self.directory.name, "keys.toml")
        return MinioTier(
            MinioConfig(
                endpoint=self.server.endpoint,
                bucket=self.bucket,
                access_key=self.server.access_key,
                secret_key=self.server.secret_key,
                encryption_key_file=write_keys(file, self.keys[-1][0], self.keys),
                negative_ttl=0,
            )
        )

    def reopen(self, tier: Tier, *, cleanly: bool) -> Tier:
        tier.close()
        self.keys.append((f"key-{len(self.keys)}", os.urandom(32).hex()))
        reopened = self.open_rotated()
        # Otherwise, spills would store these pages again.
        reopened.present(sorted(self.stored), soon())
        return reopened

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "directory"):
            self.directory.cleanup()


def test_random_histories(minio_server: MinioServer) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    EncryptedMachine.server = minio_server
    run_state_machine_as_test(
        EncryptedMachine,
        settings=settings(max_examples=5, stateful_step_count=15),
    )


def test_deadline_ends_decryption_too(sealing: MinioConfig, open_tier: OpenTier) -> None:
    tier = open_tier(sealing)
    spill(tier, KEYS)
    page: Page = make_page(KEYS[0], LENGTHS, filled=False)
    before = b"".join(page.buffers)
    assert tier.load([page], time.monotonic() - 1) == [LoadResult.FAILED]
    assert b"".join(page.buffers) == before
