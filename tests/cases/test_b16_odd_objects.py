"""Odd notes, names and numbers in the bucket and on the disk, for every command."""

import io
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from memkv_testbed.minio_server import MinioServer
from minio import Minio

from memkv_sglang.config.schema import MIB, NvmeConfig
from memkv_sglang.namespace import Namespace
from memkv_sglang.testing.pages import make_namespace
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.retention import BucketFormat
from memkv_sglang.tiers.nvme import NvmeTier
from tests.cases.commands import assert_clean, memkv

TRICK = "agents [/v2] [red] \x1b[2J\x1b]0;owned\x07 \u202e gnp.exe \u2028 \x9b31m \r\nforged: line"
NUMBERS = (0, -1, 1 << 40, 1 << 64, 10**400, 1.5, 1e308)
NAMES = ObjectNames("")


def descriptions() -> list[bytes]:
    """Return odd descriptions, of which the first is valid."""
    odd = make_namespace(model=TRICK, details={TRICK: TRICK}).description
    plain = json.loads(make_namespace().description)
    huge = make_namespace(model="x" * 10_000).description
    pages = [{**plain, "page_bytes": number} for number in NUMBERS]
    sizes = [{**plain, "page_size": number, "heads": number} for number in NUMBERS]
    return [odd, huge, *(json.dumps(each).encode() for each in (*pages, *sizes))]


def digest_of(description: bytes) -> str:
    """Return the digest under which an odd description is stored."""
    import hashlib

    return hashlib.sha256(description).hexdigest()[:32]


def pins() -> dict[str, bytes]:
    namespace, page = digest_of(descriptions()[0]), "ab" * 32
    pin = {"namespaces": [namespace], "hashes": [page], "note": TRICK}
    return {
        "plain": json.dumps({**pin, "seconds": 1e6}).encode(),
        "long": json.dumps({**pin, "seconds": 1e308}).encode(),
        "negative": json.dumps({**pin, "seconds": -1e308}).encode(),
        "infinite": json.dumps({**pin, "seconds": 1}).replace("1}", "1e999}").encode(),
        "nan": json.dumps({**pin, "seconds": float("nan")}).encode(),
        "wordy": json.dumps({**pin, "seconds": 1e6, "note": "x" * 100_000}).encode(),
        TRICK.replace("/", "").replace("\x00", ""): json.dumps({**pin, "seconds": 1e6}).encode(),
    }


@pytest.fixture
def environ(minio_server: MinioServer, tmp_path: Path, minio_config: Any) -> dict[str, str]:
    """A bucket and a directory full of odd objects."""
    netloc = minio_server.endpoint.partition("://")[2]
    client = Minio(netloc, *minio_server.root, secure=False)
    client.make_bucket(minio_config.bucket)
    disk = NvmeConfig(directory=str(tmp_path / "nvme"), capacity=64 * MIB, segment_size=8 * MIB)
    NvmeTier(disk).close()
    described = tmp_path / "nvme" / "namespaces"
    objects = {f"{NAMES.pins}{name}.json": content for name, content in pins().items()}
    objects[NAMES.format] = msgspec.json.encode(BucketFormat())
    for description in descriptions():
        digest = digest_of(description)
        objects[NAMES.description(bytes.fromhex(digest))] = description
        (described / f"{digest}.json").write_bytes(description)
        objects[f"{NAMES.namespace(bytes.fromhex(digest))}ab/{'ab' * 32}"] = b"no page"
    for name, content in objects.items():
        try:
            client.put_object(minio_config.bucket, name, io.BytesIO(content), len(content))
        except Exception as error:  # MinIO does not accept some of these names
            assert "XMinioInvalidObjectName" in str(error) or "\x1b" in name, name
    return {
        "HOME": str(tmp_path),
        "MEMKV_AGENT_SOCKET": str(tmp_path / "agent.sock"),
        "MEMKV_NVME_DIRECTORY": str(tmp_path / "nvme"),
        "MEMKV_NVME_CAPACITY": "64MiB",
        "MEMKV_NVME_SEGMENT_SIZE": "8MiB",
        "MEMKV_MINIO_ENDPOINT": minio_config.endpoint,
        "MEMKV_MINIO_BUCKET": minio_config.bucket,
        "MEMKV_MINIO_ACCESS_KEY": minio_config.access_key,
        "MEMKV_MINIO_SECRET_KEY": minio_config.secret_key,
    }


def test_every_command_shows_malformed_objects_safely(environ: dict[str, str]) -> None:
    namespace = digest_of(descriptions()[0])
    page = "ab" * 32
    verbs = (
        ("pins",),
        ("inspect",),
        ("inspect", namespace),
        ("inspect", namespace, page),
        ("pin", "--chain", page, "--note", "agents [/v2] prompt"),
        ("unpin", "plain"),
        ("gc", "--dry-run", "--collector-capacity", "1TiB"),
        ("verify",),
        ("doctor",),
        ("config",),
        ("pins", "--json"),
        ("inspect", "--json"),
        ("inspect", namespace, "--json"),
        ("doctor", "--json"),
        ("config", "--json"),
    )
    printed = {}
    for verb in verbs:
        done = memkv(*verb, environ=environ)
        assert_clean(done.stdout)
        assert_clean(done.stderr)
        assert "\nforged" not in done.stdout + done.stderr
        assert len(done.stdout) < 100_000 or "--json" in verb, verb
        printed[verb] = done
        if "--json" in verb:
            json.loads(done.stdout, parse_constant=pytest.fail)
    for verb in (*verbs[:6], *verbs[10:]):
        assert printed[verb].returncode == 0 or verb[-1] == page, (verb, printed[verb].stderr)
    assert "agents [/v2] [red]" in printed["pins",].stdout
    assert "\\u001b[2J" in printed["pins",].stdout
    shown = json.loads(printed["inspect", "--json"].stdout)
    models = {entry["namespace"]: entry["description"] for entry in shown}
    assert models[namespace]["model"] == TRICK
    assert all(
        description is None or 0 < description["page_bytes"] <= 1 << 30
        for description in models.values()
    )


@pytest.mark.parametrize(
    ("field", "number"),
    [
        (field, number)
        for field in ("page_bytes", "page_size", "heads", "head_size")
        for number in NUMBERS
        if number != 0 or field.startswith("page")  # a pool may have no heads
    ],
)
def test_a_description_with_an_impossible_number_is_rejected(field: str, number: float) -> None:
    import msgspec

    plain = json.loads(make_namespace().description)
    with pytest.raises(msgspec.DecodeError):
        Namespace.parse(json.dumps({**plain, field: number}).encode())


@pytest.mark.parametrize(
    "arguments",
    [
        ("pin", "--chain", "ab" * 32, "--for", "1" + "0" * 300 + "d"),
        ("pin", "--chain", "ab" * 32, "--for", "99999999999d"),
        ("pin", "--chain", "ab" * 32, "--for", "0"),
        ("pin", "--chain", "ab" * 32, "--for", "-1d"),
        ("pin", "--chain", "ab" * 32, "--for", "nan"),
        ("pin", "--chain", "ab" * 32, "--for", "\u0661d"),
        ("pin", "--chain", "ab" * 32, "--note", "x" * 1000),
        ("pin", "--chain", "ab" * 32, "--note", "\x1b[2J"),
        ("pin", "--chain", "ab" * 32, "--note", b"\xff"),
        ("pin", "--chain", "\u0661" * 64),
        ("pin", "--text", b"\xff"),
        ("pin", "--text", "x", "--salt", b"\xff"),
        ("pin", "--text", "x", "--extra-key", b"\xff"),
        ("pin", "--file", "/dev/null", "--text", "x"),
        ("pin", "--file", "/bin/sh"),
        ("pin", "--tokens", "\u0661,2"),
        ("pin", "--tokens", "1_000"),
        ("pin", "--tokens", "-1"),
        ("pin", "--tokens", "9" * 5000),
        ("pin", "--text", "x", "--server", "http://user:password@127.0.0.1"),
        ("pin", "--text", "x", "--server", "http://[::1"),
        ("pin", "--text", "x", "--server", "http://127.0.0.1:99999"),
        ("pin", "--text", "x", "--server", "http://\u00fc"),
        ("pin", "--text", "x", "--server", "file:///etc/passwd"),
        ("pin", "--text", "x", "--server", "http://a b\r\nX: y"),
        ("unpin", "\x1b[2J"),
        ("unpin", b"\xff"),
        ("unpin", "../../x" * 1000),
        ("inspect", "\x1b[2J"),
        ("inspect", b"\xff"),
        ("inspect", "ab", "\u0661" * 64),
        ("stats", "--watch", "--interval", "nan"),
        ("stats", "--watch", "--interval", "inf"),
        ("stats", "--watch", "--interval", "1e308"),
        ("stats", "--watch", "--interval", "-1"),
        ("bucket", "setup", "--days", "1" + "0" * 30),
        ("bucket", "setup", "--days", "-1"),
        ("bench", "--page", "1" + "0" * 40),
        ("bench", "--volume", "100PiB"),
        ("bench", "--page", "nan"),
        ("patch", "status", "--site-packages", "/\x1b[2J"),
        ("\x1b[2J",),
        (b"\xff",),
        ("--\x1b[2J",),
    ],
    ids=lambda arguments: " ".join(map(repr, arguments))[:80],
)
def test_a_malformed_argument_is_a_one_line_error(
    environ: dict[str, str], arguments: tuple[str | bytes, ...]
) -> None:
    done = memkv(*arguments, environ=environ)
    assert_clean(done.stdout)
    assert_clean(done.stderr)
    assert done.returncode in (1, 2)
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("warning"))
    assert line.startswith("error: ")
    assert len(line) < 1000
