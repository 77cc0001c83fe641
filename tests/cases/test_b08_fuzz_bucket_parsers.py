"""Parsers of a bucket's content, given inputs with the right structure and wrong values.

Each returns a valid value or refuses; none raises anything else or allocates much memory.
"""

import json
from typing import Any
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from minio.datatypes import Object, parse_list_objects
from urllib3 import HTTPResponse

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.namespace import Namespace
from memkv_sglang.tiers.minio.admin.bucket import LARGEST, _info
from memkv_sglang.tiers.minio.http.answers import DEPTH_LIMIT, NODE_LIMIT, parseable_xml, shown
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.retention.bucket_format import read_format
from memkv_sglang.tiers.minio.retention.entries import DamagedError, decode, encode, entries
from memkv_sglang.tiers.minio.retention.pins import LONGEST, Pin, _parsed
from memkv_sglang.tiers.minio.retention.records import Record
from memkv_sglang.tiers.minio.retention.rounds import StoredRound
from memkv_sglang.tiers.minio.retention.shards import Shard

TEXT = st.text(max_size=40)
HEX = st.text("0123456789abcdefABCDEFg ", max_size=70)
NUMBER = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1 << 53, 1 << 64, 10**400, 1e308, -1e308]),
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, TEXT),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def document(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """Return documents with these fields, some of them wrong, missing or superfluous, and some
    truncated.
    """
    wrong = {name: value | JSON for name, value in fields.items()}
    whole = st.fixed_dictionaries({}, optional=wrong | {"x": JSON}).map(
        lambda value: json.dumps(value).encode()
    )
    nested = st.integers(1, 50_000).map(lambda depth: b'{"x":' + b"[" * depth)
    return st.one_of(
        whole, st.tuples(whole, st.integers(0, 200)).map(lambda p: p[0][: p[1]]), nested
    )


@given(
    document(
        namespaces=st.lists(HEX | st.just("ab" * 16), max_size=4),
        hashes=st.lists(HEX | st.just("cd" * 32), max_size=4),
        seconds=NUMBER,
        note=TEXT,
    )
)
def test_pins(content: bytes) -> None:
    try:
        parsed = _parsed(msgspec.json.decode(content, type=Pin))
    except (ValueError, RecursionError):
        return
    assert all(len(digest) == 16 for digest in parsed.namespaces)
    assert all(len(page) == 32 for page in parsed.hashes)
    assert parsed.seconds <= LONGEST


REPORT = st.fixed_dictionaries(
    dict.fromkeys(("pages", "bytes", "removed_pages", "removed_bytes", "kept_pages"), NUMBER)
)


class _Reads:
    """Records that hold one content."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def read(self, _name: str, _limit: int) -> Record:
        return self._record

    def content(self, _name: str, _limit: int) -> bytes | None:
        return self._record.content


NOW = 1.8e9

PARTS = st.lists(st.fixed_dictionaries({"name": TEXT, "first": HEX}), max_size=3)


@given(
    st.none()
    | document(holder=TEXT, seconds=NUMBER, parts=PARTS, logs=st.lists(TEXT), pages=NUMBER),
    st.floats(-1e12, 1e12),
)
def test_records_of_shards(content: bytes | None, age: float) -> None:
    records = _Reads(Record(content, "etag", NOW - age, age))
    shard = Shard(records, None, ObjectNames(""), 0, 60.0)  # type: ignore[arg-type]
    if shard.read():
        assert -60 <= age <= 60
    assert 0 <= shard.state.pages <= 1 << 53
    assert all("/" not in part.name for part in shard.state.parts)
    assert all("/" not in name for name in shard.state.logs)


@given(
    st.none()
    | document(
        number=NUMBER,
        phase=st.sampled_from(["merge", "remove", "done"]),
        remove_at=NUMBER,
        order=NUMBER,
        quotas=st.lists(NUMBER),
        report=REPORT,
        oldest=NUMBER,
    )
)
def test_rounds(content: bytes | None) -> None:
    stored = StoredRound(_Reads(Record(content, "etag", NOW, 0.0)), ObjectNames(""))  # type: ignore[arg-type]
    current = stored.read()
    assert 0 <= current.number <= 1 << 53
    assert 0 <= current.order < 1 << 63
    assert current.remove_at <= NOW + 86400
    assert current.report is None or 0 <= current.report.pages <= 1 << 53


@given(document(format=NUMBER, shards=NUMBER, days=NUMBER))
def test_format_records(content: bytes) -> None:
    records = _Reads(Record(content, "etag", NOW, 0.0))
    try:
        found = read_format(records, ObjectNames(""))  # type: ignore[arg-type]
    except ConfigError as error:
        assert str(error).isprintable()
    else:
        assert found is not None
        assert (found.format, 256 % found.shards) == (2, 0)


@given(st.binary(max_size=400), st.integers(0, 5000), st.lists(st.integers(0, 8000), max_size=4))
def test_logs(noise: bytes, length: int, flips: list[int]) -> None:
    rows = [(bytes([i]) * 48, i, i, i, i) for i in range(1, 40)]
    content = bytearray(encode(entries(rows)))
    for place in flips:
        content[place % len(content)] ^= 0x40
    for damaged in (bytes(content), bytes(content[:length]), noise, bytes(content) + noise):
        try:
            found = decode(damaged)
        except DamagedError:
            continue
        assert found.tobytes() == entries(rows).tobytes(), "damage went unnoticed"


@given(
    document(
        model=TEXT,
        kv_dtype=TEXT,
        layout=TEXT,
        page_size=NUMBER,
        page_bytes=NUMBER,
        layers=st.lists(NUMBER, max_size=3),
        details=st.dictionaries(TEXT, TEXT, max_size=3),
    )
)
def test_descriptions(content: bytes) -> None:
    try:
        namespace = Namespace.parse(content)
    except msgspec.MsgspecError:
        return
    assert Namespace.parse(namespace.description) == namespace


NAME = st.one_of(
    TEXT,
    st.tuples(HEX, HEX, HEX).map("/".join),
    st.sampled_from(
        ["ab" * 16 + "/cd/" + "cd" * 32, "pins/x", "quarantine/" + "ab" * 16 + "/" + "cd" * 32]
    ),
)


@given(st.sampled_from(["", "prefix", "a/b"]), NAME, NAME)
def test_object_names(prefix: str, name: str, other: str) -> None:
    names = ObjectNames(prefix)
    for full in (name, names.root + name, other + names.root + name):
        if (key := names.page_key(full)) is not None:
            assert names.page(key) == full
        if names.is_quarantined(full):
            assert full.startswith(names.quarantined)
        past = names.past_foreign(full)
        assert past >= full or not full.startswith(names.root)


XML_CHARACTERS = st.one_of(
    st.characters(),
    st.sampled_from("\x00\x01\x0b\x1f\x7f\ufffe\uffff<&"),
    st.sampled_from(["&#1;", "&#x0;", "&#xD800;", "&#99999999999;", "%00", "+"]),
)
XML_TEXT = st.lists(XML_CHARACTERS, max_size=20).map("".join)


@st.composite
def listings(draw: st.DrawFn) -> bytes:
    """Return listings with odd names, sizes and dates."""
    parts = []
    for _ in range(draw(st.integers(0, 4))):
        key = escape(draw(XML_TEXT)) if draw(st.booleans()) else draw(XML_TEXT)
        size = draw(NUMBER | TEXT)
        date = draw(
            st.sampled_from(
                ["2026-01-01T00:00:00.000Z", "9999-12-31T23:59:59.999Z", "0000-00-00", ""]
            )
        )
        parts.append(
            f"<Contents><Key>{key}</Key><Size>{size}</Size><LastModified>{date}</LastModified>"
            f"<ETag>{escape(draw(TEXT))}</ETag></Contents>"
        )
    encoding = draw(st.sampled_from(["", "<EncodingType>url</EncodingType>"]))
    text = (
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>'
        f"{encoding}{''.join(parts)}</ListBucketResult>"
    )
    return text.encode("utf-8", "surrogatepass")


@given(listings())
def test_listings(content: bytes) -> None:
    try:
        content = parseable_xml(content)
    except ValueError:
        return
    try:
        ET.fromstring(content.decode())
    except ET.ParseError:  # minio-py rejects malformed XML
        return
    try:
        found, *_ = parse_list_objects(HTTPResponse(content), "bucket")
    except Exception:  # minio-py rejects the listing; callers treat that as a failed request
        return
    for info in filter(None, map(_info, found)):
        assert 0 <= info.size <= LARGEST
        assert info.name


@given(XML_TEXT)
def test_forbidden_characters_stop_no_listing(name: str) -> None:
    """Some servers copy names into them unescaped."""
    text = f"<R><Key>{escape(name)}</Key></R>".encode("utf-8", "surrogatepass")
    ET.fromstring(parseable_xml(text).decode())


@given(st.integers(1, 100), st.integers(0, 3), st.booleans())
def test_nested_and_large_xml(depth: int, extra: int, entities: bool) -> None:
    doctype = b'<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>' if entities else b""
    content = doctype + b"<a>" * depth + b"</a>" * depth
    try:
        parseable_xml(content)
    except ValueError:
        assert entities or depth > DEPTH_LIMIT
    else:
        assert not entities
        assert depth <= DEPTH_LIMIT


@pytest.mark.parametrize("end", [b"", b"<", b"</b>", b"&x;", b"\xff"])
def test_malformed_xml_is_bounded_up_to_its_fault(end: bytes) -> None:
    content = b"<a>" * DEPTH_LIMIT + end
    assert parseable_xml(content).startswith(b"<a>" * DEPTH_LIMIT)
    with pytest.raises(ET.ParseError):
        ET.fromstring(parseable_xml(content).decode())
    with pytest.raises(ValueError, match="too deep"):
        parseable_xml(b"<a>" + content)
    with pytest.raises(ValueError, match="document type"):
        parseable_xml(b'<!DOCTYPE a [<!ENTITY a "a">]>' + content)


def test_xml_of_too_many_parts_is_refused() -> None:
    for part in (b"<b/>", b"".join(b'<b a%d="">' % i + b"</b>" for i in range(2))):
        content = b"<a>" + part * NODE_LIMIT + b"</a>"
        try:
            parseable_xml(content)
        except ValueError as error:
            assert "too long" in str(error)
        else:
            raise AssertionError("it was taken")


@given(st.binary(max_size=300))
def test_any_bytes_as_a_response(content: bytes) -> None:
    try:
        parseable_xml(content)
        parseable_xml(b"<" + content)
    except ValueError:
        pass


@given(st.text())
def test_shown_text_is_one_short_printable_line(text: str) -> None:
    line = shown(text)
    assert line.isprintable()
    assert len(line) <= 80 * 10 + 3


@given(st.none() | TEXT, st.none() | st.integers(), st.none() | st.datetimes())
def test_listing_entries_are_validated(name: str | None, size: int | None, modified: Any) -> None:
    info = _info(Object("bucket", name, last_modified=modified, size=size))
    assert info is None or (info.name and 0 <= info.size <= LARGEST)
