"""No foreign object in the bucket stops, slows or misleads a collection or a command, and none is
removed.
"""

import io
import json
import re
import resource
from collections.abc import Iterator

import msgspec
import pytest
from memkv_testbed.minio_server import MinioServer

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import PageKey
from memkv_sglang.testing.pages import make_chain, make_page
from memkv_sglang.tiers.base import LoadResult, TierError
from memkv_sglang.tiers.minio.admin.bucket import Bucket
from memkv_sglang.tiers.minio.auth.signing import credential_provider
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.retention import pins as pin_module
from memkv_sglang.tiers.minio.retention.pins import KeptPages, Pin, PinStore
from memkv_sglang.tiers.minio.retention.worker import _Pacer
from tests.cases.s3_servers import OddServer, bucket_of, whole
from tests.cli.cli_node import Run
from tests.cli.conftest import environ, run  # noqa: F401 - fixtures
from tests.collector.bucket import NAMESPACE, PAGE, Bucketful, deadline
from tests.collector.test_collect import pin

NAMES = ObjectNames("")
DIGEST = NAMESPACE.digest.hex()
DEEP = b"[" * 5000 + b"]" * 5000
HASH = "ab" * 32


@pytest.fixture
def full(minio_config: MinioConfig, minio_server: MinioServer) -> Iterator[Bucketful]:
    with bucket_of(minio_config, minio_server) as found:
        yield found


def put(full: Bucketful, name: str, content: bytes = b"foreign") -> None:
    full.admin.put_object(full.config.bucket, name, io.BytesIO(content), len(content))


def names_in(full: Bucketful) -> set[str]:
    """Return all objects but this project's own records, logs and index."""
    found = full.admin.list_objects(full.config.bucket, recursive=True)
    names = {item.object_name or "" for item in found}
    return {name for name in names if not OWN.fullmatch(name)}


OWN = re.compile(
    r"memkv\.json|shards/[0-9a-f]{2}\.json|collector/round\.json|index/[0-9a-f]{2}-[0-9a-f]{32}"
    r"|logs/\d{10}-[0-9a-f]{32}-[0-9a-f]+"
)

FOREIGN = [
    "notes/readme",
    "directory/",
    f"{DIGEST}/",
    f"{DIGEST}/notes",
    f"{DIGEST}/ab/notes",
    f"{DIGEST}/cd/{HASH}",  # another hash's folder
    f"{DIGEST}/ab/{HASH}/more",
    f"{DIGEST}/ab/{HASH.upper()}",
    f"{DIGEST}/more/ab/{HASH}",
    f"{DIGEST.upper()}/ab/{HASH}",
    f"x/{DIGEST}/ab/{HASH}",
    "quarantine/readme",
    f"quarantine/{DIGEST}/readme",
    "0" * 900,
    "0" * 32 + "/x",
    "strange/\u202e\u00e9\U0001f600 +%2F%00&#1;<b>\x01\x7f\n",
    "a\x01",
    "f" * 33 + "/x",
]


def test_foreign_objects_of_any_name_stay(full: Bucketful) -> None:
    stored = []
    for name in FOREIGN:
        try:
            put(full, name)
        except Exception:
            continue
        stored.append(name)
    assert len(stored) >= len(FOREIGN) - 3
    chain = full.spill("chain", 4)
    full.tier.describe(NAMESPACE)
    report = full.collect(capacity=1).report
    assert (report.removed_pages, report.pages) == (4, 0)
    full.tier.clear(NAMESPACE.digest)
    assert not any(full.there(chain))
    assert names_in(full) == set(stored)


def test_an_object_named_like_a_page_stays(full: Bucketful) -> None:
    key = make_chain(NAMESPACE, 1, "foreign").keys()[0]
    put(full, NAMES.page(key), b"x" * PAGE)
    page = make_page(key, [PAGE], filled=False)
    assert full.tier.load([page], deadline()) == [LoadResult.MISSING]
    full.spill("chain", 5)
    report = full.collect(capacity=2 * PAGE, use_period=1).report
    assert (report.removed_pages, report.pages) == (4, 1)
    assert full.tier.clear(NAMESPACE.digest) == 1
    assert full.tier.remove([key]) == 0
    assert names_in(full) == {NAMES.page(key)}


def test_foreign_folders_are_skipped(full: Bucketful, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memkv_sglang.tiers.minio.admin.bucket.LISTED_AT_ONCE", 3)
    for i in range(12):
        put(full, f"0-others/{i:02}")
    chain = full.spill("chain", 3)
    bucket = full.tier.access.control().bucket
    listed = [item.name for item in bucket.objects("", NAMES.past_foreign)]
    assert sum(name.startswith("0-others/") for name in listed) == 3
    assert [name for name in listed if NAMES.page_key(name)] == sorted(
        NAMES.page(key) for key in chain.keys()
    )


ODD_PINS = [
    b"",
    b"\xff\xfe",
    b"null",
    b'{"x":' + DEEP + b',"namespaces":[],"hashes":[],"seconds":1}',
    DEEP,
    b'{"namespaces":["zz"],"hashes":[],"seconds":1}',
    json.dumps({"namespaces": [DIGEST], "hashes": ["00"], "seconds": 9}).encode(),
    json.dumps({"namespaces": [DIGEST], "hashes": [HASH], "seconds": "x"}).encode(),
    b'{"namespaces":[],"hashes":[],"seconds":1e999}',
    json.dumps({"namespaces": [], "hashes": [], "seconds": 9, "note": "n" * 5000}).encode(),
    b" " * ((4 << 20) + 1),
]


def test_malformed_pins_are_skipped_and_reported(full: Bucketful, run: Run) -> None:  # noqa: F811
    for i, content in enumerate(ODD_PINS):
        put(full, f"pins/odd{i}.json", content)
    put(full, "pins/deeper/0011223344556677.json", ODD_PINS[0])
    put(full, "pins/\x1b[31mred.json", b"{}")
    chain = full.spill("chain", 4)
    made = pin(full, chain, 3600)
    before = names_in(full)
    collection = full.collect(capacity=1)
    assert collection.report.kept_pages == 4
    assert names_in(full) == before
    told = run("pins")
    assert told.status == 0
    assert made.name in told.out
    assert "keep nothing: 13: " in told.err
    assert "\x1b" not in told.out + told.err
    doctor = run("doctor")
    assert "keep nothing" in doctor.out.replace("\n", " ")
    assert full.tier.read_pins()
    assert full.tier.telemetry.counts()["odd_pins"] == 13
    assert run("unpin", "odd0").status == 0
    assert run("unpin", "../odd1").status == 2  # a usage error


def test_a_small_pin_that_names_millions_of_pages_takes_little(full: Bucketful) -> None:
    count = 1500
    content = json.dumps(
        {
            "namespaces": [f"{i:032x}" for i in range(count)],
            "hashes": [f"{i:064x}" for i in range(count)],
            "seconds": 1e6,
        }
    ).encode()
    put(full, "pins/explode.json", content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = full.tier.read_pins()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10
    assert len(kept) == count * count
    assert PageKey(bytes(15) + b"\x01", bytes(31) + b"\x02") in kept
    assert PageKey(b"\xff" * 16, bytes(32)) not in kept


def test_equal_pages_of_many_pins_take_bounded_memory() -> None:
    kept = KeptPages()
    for i in range(2000):
        kept.add(frozenset([i.to_bytes(16, "big")]), [bytes(32)])
    assert len(list(kept)) == 2000
    assert PageKey((1999).to_bytes(16, "big"), bytes(32)) in kept


def test_thousands_of_pins_are_read_once(full: Bucketful, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(300):
        content = json.dumps({"namespaces": [DIGEST], "hashes": [f"{i:064x}"], "seconds": 1e6})
        put(full, f"pins/p{i}.json", content.encode())
    store = PinStore(*full.tier.access.control())
    read: list[str] = []
    original = type(store._records).read

    def counted(records: object, name: str, *limit: int) -> object:
        read.append(name)
        return original(records, name, *limit)  # type: ignore[arg-type]

    monkeypatch.setattr(type(store._records), "read", counted)
    steps: list[int] = []
    assert len(store.look(step=steps.append).kept) == 300
    assert (len(read), steps) == (300, [100, 200, 300])
    assert len(store.look().kept) == 300
    assert len(read) == 300
    changed = json.dumps({"namespaces": [DIGEST], "hashes": [HASH], "seconds": 1e6}).encode()
    put(full, "pins/p7.json", changed)
    assert PageKey(NAMESPACE.digest, bytes.fromhex(HASH)) in store.kept()
    assert len(read) == 301


def test_huge_pins_do_not_crowd_out_small_ones(
    full: Bucketful, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pin_module, "TOTAL_LIMIT", 10_000)
    for i in range(3):
        put(full, f"pins/000{i}.json", b" " * 9_000)
    chain = full.spill("chain", 3)
    pin(full, chain, 3600)
    assert set(chain.keys()) <= set(full.tier.read_pins())


RECORDS = [
    b'{"holder":"h","seconds":1e308}',
    b'{"holder":"h","seconds":-1}',
    b'{"x":' + DEEP + b',"holder":"h","seconds":600}',
    b'{"holder":"h","seconds":600,"pages":1e300}',
    b'{"holder":"h","seconds":0,"pages":%b}' % (b"9" * 1000),
    b'{"holder":"%b","seconds":600}' % (b"h" * 5000),
    b'{"number":1e308,"phase":"remove"}',
    b'{"number":7,"phase":"remove","remove_at":1e300}',
    b'{"number":-1,"phase":"gone"}',
    b" " * (5 << 20),
]


@pytest.mark.parametrize("content", RECORDS, ids=range(len(RECORDS)))
def test_no_record_stops_collections(full: Bucketful, content: bytes) -> None:
    chain = full.spill("chain", 4)
    put(full, NAMES.round, content)
    put(full, f"{NAMES.shards}00.json", content)
    report = full.collect(capacity=1, lease_ttl=5).report
    assert report.pages == 0
    assert not any(full.there(chain))


def test_odd_logs_and_parts_are_left_or_skipped(full: Bucketful) -> None:
    foreign = {"logs/readme", "logs/x/" + "0" * 10, "index/readme", "shards/readme"}
    for name in foreign:
        put(full, name)
    for i, content in enumerate((b"", b"MKVE", b"\xff" * 5000, b"MKVE" + bytes(5000))):
        put(full, f"logs/{i:010}-{i:032x}", content)
    chain = full.spill("chain", 4)
    assert full.collect(capacity=2 * PAGE, use_period=1).report.pages == 1
    assert full.tier.telemetry.counts()["damaged_logs"] >= 4
    assert foreign <= names_in(full)
    assert sum(full.there(chain)) == 1


def test_a_pause_is_never_as_long_as_the_lease() -> None:
    class Waits:
        longest = 0.0

        def wait(self, seconds: float) -> bool:
            self.longest = max(self.longest, seconds)
            return False

    waits = Waits()
    pacer = _Pacer(waits, 5.0)  # type: ignore[arg-type]
    pacer._began -= 100.0
    pacer.step("listed", 0, None)
    assert waits.longest <= 5.0 / 3


DESCRIPTIONS = [
    b"",
    DEEP,
    b'{"details":{"a":' + DEEP + b"}}",
    b"\xff",
    NAMESPACE.description,  # the description of another namespace
    b" " * (1 << 20) + NAMESPACE.description,
    msgspec.json.encode({"model": "\x1b[31m"}),
]

LYING = [msgspec.structs.replace(NAMESPACE, page_bytes=size) for size in (0, -1, 1 << 40)]


def test_malformed_descriptions_are_skipped(full: Bucketful, run: Run) -> None:  # noqa: F811
    for i, content in enumerate(DESCRIPTIONS):
        put(full, f"{i:032x}/namespace.json", content)
    for namespace in LYING:
        put(full, NAMES.description(namespace.digest), namespace.description)
        put(full, f"{namespace.digest.hex()}/ab/{HASH}", b"x")
    full.tier.describe(NAMESPACE)
    assert full.tier.namespaces() == {NAMESPACE.digest: NAMESPACE}
    assert full.tier.telemetry.counts()["odd_descriptions"] == len(DESCRIPTIONS + LYING)
    shown = run("inspect", MEMKV_NVME_DIRECTORY="")
    assert shown.status == 0
    assert DIGEST in shown.out
    assert "Traceback" not in shown.err
    assert run("verify", MEMKV_NVME_DIRECTORY="").status == 0


def test_number_of_namespaces_read_is_bounded(
    full: Bucketful, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memkv_sglang.tiers.minio.tier.NAMESPACES_LIMIT", 5)
    for i in range(9):
        put(full, f"{i:032x}/x")
    assert full.tier.namespaces() == {}


def test_a_nested_description_is_no_namespace() -> None:
    with pytest.raises(msgspec.MsgspecError):
        Namespace.parse(b'{"details":' + b'{"a":' * 100_000)


def test_pin_names_are_derived_from_their_content() -> None:
    made = Pin(namespaces=[DIGEST], hashes=[HASH], seconds=1.0)
    assert pin_module._OWN_NAME.fullmatch(made.name)


RESULTS = [
    b"",
    b"{}",
    b"<x",
    b"<Error><Code>SlowDown</Code></Error>",
    b"<DeleteResult><Error/></DeleteResult>",
    b"<DeleteResult><Error><Code>&#27;[31m</Code></Error></DeleteResult>",
    b"<DeleteResult>" + b"<Error><Code>Odd</Code></Error>" * 30_000 + b"</DeleteResult>",
    b"<a>" * 50_000,
    b'<!DOCTYPE a [<!ENTITY a "aaaa">]><DeleteResult>&a;</DeleteResult>',
    b"\xff\xfe<\x00",
]


@pytest.mark.parametrize("content", RESULTS, ids=range(len(RESULTS)))
def test_a_malformed_removal_response_is_a_one_line_error(content: bytes) -> None:
    with OddServer(lambda _, send, __: send(whole(content))) as server:
        config = MinioConfig(endpoint=server.url, access_key="someone", secret_key="secretsecret")
        bucket = Bucket(config, credential_provider(config), None)
        with pytest.raises(TierError) as raised:
            bucket.remove(["name"])
        bucket.close()
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500
