"""Probe a server with real requests. A failing probe raises, and never counts as passed."""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from urllib.parse import quote

from memkv_sglang.finding import Finding
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.admin import Bucket
from memkv_sglang.tiers.minio.auth import NO_FIELDS
from memkv_sglang.tiers.minio.http import (
    Connection,
    ResponseHead,
    StatusError,
    TransferError,
    modified_time,
    refused,
    shown,
)
from memkv_sglang.tiers.minio.names import ObjectNames, is_stored
from memkv_sglang.tiers.minio.objects import ObjectClient, refuse
from memkv_sglang.tiers.minio.probe.support import NEW, Conditions, ServerSupport

WRITERS = 2
"""Number of concurrent writers, of which one must win. SeaweedFS makes each of them wait a second.
"""

ROUNDS = 8
"""Number of rounds of this race. A server without atomic writes loses most rounds."""

COPIES = 2
"""Number of objects that are copied onto themselves. One is not enough, because one server updates
only the first object's time."""

NEXT_SECOND = 1.1
"""Seconds to wait before a copy, which is longer than the resolution of Last-Modified, a second."""

CALL_SECONDS = 5.0
"""Maximum seconds for one request."""

LOST = frozenset({HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND})
"""Status codes of a conditional write that another writer has beaten. AWS S3 also sends 409."""

ONE_COLLECTOR = "set collector.run = always on one node only, or run `memkv gc` from one machine"


def probe_server(
    client: ObjectClient,
    bucket: Bucket,
    names: ObjectNames,
    bucket_name: str,
    storage_fields: Mapping[str, str] = NO_FIELDS,
) -> ServerSupport:
    """Find out what a bucket's server supports.

    Blocks for seconds and sends about 60 small requests. `storage_fields` are sent with each PUT.
    All objects are under `ObjectNames.probes` and are removed afterwards. Needs the rights of a
    writer. Raises `TierError` if a probe cannot run.
    """
    prefix = f"{names.probes}{uuid.uuid4().hex}/"
    probe = _Probe(client, prefix, bucket_name, storage_fields)
    try:
        conditions, conditions_found = probe.conditions()
        copy_renews, copy_found = probe.copies()
        heads = probe.heads()
        keep_alive = all(head.keep_alive for head in heads)
        listing_found = _check_listing(bucket, prefix, probe.written)
        versioned = _is_versioned(bucket, probe.version_ids)
        bucket.remove(probe.written)
        removal_found = _check_removal(probe)
    except (StatusError, TransferError, threading.BrokenBarrierError) as error:
        raise TierError(f"could not probe the server: {error}") from error
    finally:
        with suppress(TierError):
            bucket.remove(probe.written)
    return ServerSupport(
        conditions=conditions,
        copy_renews=copy_renews,
        versioned=versioned,
        keep_alive=keep_alive,
        findings=(
            conditions_found,
            copy_found,
            listing_found,
            removal_found,
            _versions_finding(versioned),
            _keep_alive_finding(keep_alive),
        ),
    )


class _Probe:
    """Writes objects under one prefix, and remembers their names."""

    def __init__(
        self,
        client: ObjectClient,
        prefix: str,
        bucket_name: str,
        storage_fields: Mapping[str, str],
    ) -> None:
        self._client = client
        self._prefix = prefix
        self._bucket_name = bucket_name
        self._storage_fields = storage_fields
        self.written: list[str] = []
        self.version_ids = False
        """Whether responses to writes contained version ids."""

    def conditions(self) -> tuple[Conditions, Finding]:
        """Find out which form of conditional writes works, if any."""
        form, problem = self._sequence()
        if form is not Conditions.NONE:
            nobody = 0
            with ThreadPoolExecutor(WRITERS) as writers:
                for number in range(ROUNDS):
                    winners = self._compete(writers, f"race-{number}", form, over=number % 2 == 1)
                    if winners > 1:
                        form, problem = Conditions.NONE, f"{winners} of {WRITERS} writers won"
                        break
                    nobody += winners == 0
            if form is not Conditions.NONE:
                return form, _working(form, nobody)
        detail = f"do not work ({problem}), so nodes cannot exclude each other"
        return form, Finding("warn", "conditions", f"conditional writes {detail}", ONE_COLLECTOR)

    def copies(self) -> tuple[bool, Finding]:
        """Find out whether copying an object onto itself updates its LastModified."""
        names = [self._name(f"copy-{number}") for number in range(COPIES)]
        for name in names:
            self._put(name, b"copy", {})
        before = [self._head(name) for name in names]
        time.sleep(NEXT_SECOND)
        try:
            for name, head in zip(names, before, strict=True):
                self._copy(name, head)
        except StatusError as error:
            problem = f"the server refuses to copy an object onto itself ({error})"
        else:
            after = [self._head(name) for name in names]
            moved = [
                modified_time(b) > modified_time(a) for a, b in zip(before, after, strict=True)
            ]
            if all(moved):
                detail = "a copy onto itself moves an object's LastModified"
                return True, Finding("ok", "copy", detail)
            problem = "a copy onto itself does not move an object's LastModified"
        advice = "if the bucket has a lifecycle rule, give it more days than pages are in use"
        return False, Finding("warn", "copy", problem, advice)

    def heads(self) -> list[ResponseHead]:
        """Send a HEAD for every object, pipelined."""
        deadline = time.monotonic() + CALL_SECONDS
        return self._client.heads(self.written, deadline, ways=1)

    def _sequence(self) -> tuple[Conditions, str]:
        """Try writes one after the other. Returns why they fail; None if they work."""
        name = self._name("sequence")
        first = self._put(name, b"first", NEW)
        if first is None:
            raise TierError("the server refuses to create an object with If-None-Match")
        if self._put(name, b"again", NEW) is not None:
            return Conditions.NONE, "If-None-Match is ignored"
        for form in (Conditions.QUOTED, Conditions.BARE):
            if self._put(name, b"second", form.fields(first)) is not None:
                if self._put(name, b"stale", form.fields(first)) is not None:
                    return Conditions.NONE, "If-Match is ignored"
                return form, ""
        return Conditions.NONE, "If-Match refuses the current ETag"

    def _compete(
        self, writers: ThreadPoolExecutor, name: str, form: Conditions, *, over: bool
    ) -> int:
        """Make writers create the same object at once, or replace the same version (`over`).

        Returns how many succeeded.
        """
        name = self._name(name)
        etag = self._put(name, b"contested", NEW) if over else None
        together = threading.Barrier(WRITERS, timeout=CALL_SECONDS)

        def write(number: int) -> bool:
            together.wait()
            return self._put(name, b"writer %d" % number, form.fields(etag)) is not None

        return sum(writers.map(write, range(WRITERS)))

    def _name(self, ending: str) -> str:
        name = f"{self._prefix}{ending}"
        self.written.append(name)
        return name

    def _put(self, name: str, content: bytes, condition: Mapping[str, str]) -> str | None:
        """Return the ETag of the object written; None if the condition was not met."""
        fields = {"content-length": str(len(content)), **condition, **self._storage_fields}
        deadline = time.monotonic() + CALL_SECONDS

        def receive(connection: Connection, head: ResponseHead) -> str:
            if head.status != HTTPStatus.OK:
                refuse(connection, head, deadline, "PUT")
            connection.discard_body(deadline)
            version = head.field(b"x-amz-version-id")
            self.version_ids = self.version_ids or version not in (None, b"null")
            return (head.field(b"etag") or b"").decode("latin-1")

        try:
            return self._client.exchange(
                "PUT", name, deadline, receive, fields=lambda: fields, body=(memoryview(content),)
            )
        except StatusError as error:
            if condition and error.status in LOST and error.code != "NoSuchBucket":
                return None
            raise

    def _head(self, name: str) -> ResponseHead:
        def receive(_: Connection, head: ResponseHead) -> ResponseHead:
            if head.status != HTTPStatus.OK:
                raise refused(head, b"", "HEAD")
            return head

        deadline = time.monotonic() + CALL_SECONDS
        return self._client.exchange("HEAD", name, deadline, receive, bodiless=True)

    def _copy(self, name: str, head: ResponseHead) -> None:
        fields = {
            "content-length": "0",
            "x-amz-copy-source": quote(f"/{self._bucket_name}/{name}"),
            "x-amz-copy-source-if-match": (head.field(b"etag") or b"").decode("latin-1"),
            "x-amz-metadata-directive": "REPLACE",
            **self._storage_fields,
        }
        deadline = time.monotonic() + CALL_SECONDS

        def receive(connection: Connection, head: ResponseHead) -> None:
            if head.status != HTTPStatus.OK:
                refuse(connection, head, deadline, "PUT")
            if not is_stored(head, body := connection.discard_body(deadline)):
                raise TierError(f"the server did not confirm a copy: {shown(repr(body))}")

        self._client.exchange("PUT", name, deadline, receive, fields=lambda: fields)


def _check_listing(bucket: Bucket, prefix: str, written: Sequence[str]) -> Finding:
    listed = Counter(item.name for item in bucket.objects(prefix))
    if listed == Counter(written):
        return Finding("ok", "listing", "lists what was written")
    detail = f"a listing names {listed.total()} objects where {len(written)} were written"
    return Finding("FAIL", "listing", detail, "use another S3 server: pages are removed by listing")


def _check_removal(probe: _Probe) -> Finding:
    left = sum(head.status == HTTPStatus.OK for head in probe.heads())
    if not left:
        return Finding("ok", "removal", "removes many objects with one request")
    detail = f"{left} of {len(probe.written)} objects are still there after their removal"
    return Finding("FAIL", "removal", detail, "use another S3 server, or look at this one's log")


def _is_versioned(bucket: Bucket, version_ids: bool) -> bool:
    """Ask the server. Without permission to ask, infer it from the responses to writes."""
    status = bucket.versioning()
    return version_ids if status is None else status != "Off"


def _versions_finding(versioned: bool) -> Finding:
    if not versioned:
        return Finding("ok", "versions", "the bucket keeps no versions")
    detail = "the bucket is versioned, so removing pages frees no space"
    return Finding("warn", "versions", detail, "run `memkv bucket setup` for advice")


def _keep_alive_finding(keep_alive: bool) -> Finding:
    if keep_alive:
        return Finding("ok", "connections", "the server answers many requests per connection")
    return Finding(
        "warn",
        "connections",
        "the server closes each connection after a response, which slows everything down",
        "turn on keep-alive in the server or proxy (versitygw: --keep-alive)",
    )


def _working(form: Conditions, nobody: int) -> Finding:
    etag = " with bare ETags" if form is Conditions.BARE else ""
    if not nobody:
        return Finding("ok", "conditions", f"conditional writes work{etag}")
    detail = f"conditional writes work{etag}, but all writers lost {nobody} of {ROUNDS} races"
    return Finding("warn", "conditions", detail, "none is needed; a collection may start later")
