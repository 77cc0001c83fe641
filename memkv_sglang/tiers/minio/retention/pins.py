"""Pins: small objects in the bucket that protect chains from being collected for a while.

Anyone with write access to the bucket can write anything under `pins/`. So everything is limited,
and objects that are not read are reported; see `Unusable`.
"""

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import Annotated, NamedTuple

import msgspec

from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PAGE_HASH_SIZE, PageKey
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.admin import Bucket, ObjectInfo
from memkv_sglang.tiers.minio.http import shown
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.retention.records import LIMIT, Records

log = logging.getLogger(__name__)

LISTED_LIMIT = 20_000
"""Maximum number of objects that are listed under `pins/`, which takes twenty requests."""

TOTAL_LIMIT = 32 << 20
"""Maximum bytes of all pins. These are hashes of 500,000 pages, which take 80 MB of memory."""

NAMES_SHOWN = 5
"""Maximum number of objects that a report names."""

LONGEST = 36500 * 86400.0
"""Maximum lifetime of a pin, in seconds."""

NOTE_LIMIT = 1000
"""Maximum length of a note, in characters."""

READS_A_STEP = 100
"""Number of pins that are read in one step."""

_OWN_NAME = re.compile("[0-9a-f]{16}")


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """A chain to keep in several namespaces, which are those of a model's ranks and pools."""

    namespaces: Sequence[str]
    """Digests of the namespaces, in hex."""
    hashes: Sequence[str]
    """Page hashes, in hex, from the start of the chain."""
    seconds: float
    """Seconds for which the pin lasts after it was written."""
    note: Annotated[str, msgspec.Meta(max_length=NOTE_LIMIT)] = ""
    """Why the chain is pinned."""

    @property
    def name(self) -> str:
        """Name of the pin. Equal chains have equal names, so pinning again renews the pin."""
        return hashlib.sha256("/".join([*self.namespaces, *self.hashes]).encode()).hexdigest()[:16]


class StoredPin(NamedTuple):
    """A pin in the bucket."""

    name: str
    pin: Pin
    left: float
    """Seconds until the pin expires, by the server's clock; 0 or less if it has expired."""


class Unusable(NamedTuple):
    """Objects under `pins/` that are not valid pins and therefore protect no pages."""

    objects: int = 0
    examples: tuple[str, ...] = ()
    """Some of the names, each with the reason, in printable form."""

    @property
    def text(self) -> str:
        """One line that describes the objects; empty if there are none."""
        if not self.objects:
            return ""
        more = ", ..." if self.objects > len(self.examples) else ""
        examples = ", ".join(self.examples)
        return f"objects under pins/ that keep nothing: {self.objects}: {examples}{more}"


class KeptPages(Collection[PageKey]):
    """The pinned pages. Their memory grows with the size of the pins, not with the pages."""

    def __init__(self) -> None:
        """Start empty."""
        self._namespaces: dict[bytes, list[frozenset[bytes]]] = {}
        """For each page hash, the namespaces of each pin that contains it."""
        self._length = 0

    def add(self, namespaces: frozenset[bytes], hashes: Collection[bytes]) -> None:
        """Add the pages of a chain in several namespaces."""
        for page in hashes:
            self._namespaces.setdefault(page, []).append(namespaces)
        self._length += len(namespaces) * len(hashes)

    def hashes(self) -> list[bytes]:
        """Return the hashes of the pages, in any order."""
        return list(self._namespaces)

    def __contains__(self, key: object) -> bool:
        """Return whether a `PageKey` is pinned."""
        if not isinstance(key, PageKey) or key.hash not in self._namespaces:
            return False  # the usual case in an eviction
        return any(key.namespace in namespaces for namespaces in self._namespaces[key.hash])

    def __len__(self) -> int:
        """Return the number of pages. A page counts once for each pin that keeps it."""
        return self._length

    def __iter__(self) -> Iterator[PageKey]:
        for page, pins in self._namespaces.items():
            for namespace in frozenset().union(*pins):
                yield PageKey(namespace, page)


class _Parsed(NamedTuple):
    """A pin in memory."""

    namespaces: frozenset[bytes]
    hashes: tuple[bytes, ...]
    seconds: float


class _Cached(NamedTuple):
    """The cached content of an object, which is valid while its ETag is the same."""

    etag: str
    parsed: _Parsed | None
    problem: str


class Look(NamedTuple):
    """A snapshot of the pins."""

    kept: KeptPages
    ended: list[str]
    """Object names of expired pins that this project wrote."""
    unusable: Unusable
    version: str = ""
    """A version that changes with the set of pins that have not expired."""


class PinStore:
    """The pins of a bucket. Thread-safe. Calls block, and raise `TierError`."""

    def __init__(
        self,
        bucket: Bucket,
        records: Records,
        names: ObjectNames,
        *,
        count_unusable: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Store pins next to the pages, under the prefix of `names`.

        `count_unusable` is called with the number of unusable objects when those have changed.
        """
        self._count_unusable = count_unusable
        self._bucket = bucket
        self._records = records
        self._clock_object = names.format
        self._prefix = names.pins
        self._cached: dict[str, _Cached] = {}
        self._reported = Unusable()
        self._lock = threading.Lock()

    def add(self, pin: Pin) -> None:
        """Pin a chain, or renew its pin."""
        name = self._object(pin.name)
        content = msgspec.json.encode(pin)
        if len(content) > LIMIT:
            raise TierError(
                f"the pin has {len(pin.hashes)} pages, which make {len(content)} bytes of at most "
                f"{LIMIT}; pin a shorter prefix, or choose one namespace"
            )
        if len(pin.note) > NOTE_LIMIT:
            raise TierError(f"the note has {len(pin.note)} characters; use at most {NOTE_LIMIT}")
        before = self._records.read(name, 0)
        if self._records.write(name, content, before.version if before else None) is None:
            raise TierError("the pin was just changed by another process; try again")

    def remove(self, name: str) -> bool:
        """Unpin a chain. Returns False if there was no such pin."""
        exists = self._records.read(self._object(name), 0) is not None
        if exists:
            self._bucket.remove([self._object(name)])
        return exists

    def all(self) -> list[StoredPin]:
        """Read all pins, including expired ones."""
        return self.report()[0]

    def report(self) -> tuple[list[StoredPin], Unusable]:
        """Read all pins, including expired ones; also return the objects that are not pins."""
        now = self._records.clock(self._clock_object)
        objects, unusable = self._list()
        found = []
        for item in objects:
            pin, problem = self._read(item)
            if pin is None:
                unusable.append((item.name, problem))
            else:
                left = min(pin.seconds, LONGEST) - _age(item, now)
                found.append(StoredPin(self._name(item.name), pin, left))
        return sorted(found), _unusable(unusable)

    def look(self, now: float | None = None, step: Callable[[int], None] = lambda _: None) -> Look:
        """Return a snapshot of the pins. Reads only pins that changed since the last call.

        `now` is the server's time, if known. `step` is called with the number of pins read so far,
        every `READS_A_STEP` pins.
        """
        objects, unusable = self._list()
        if now is None:  # most buckets have no pins, and then the time is not needed
            now = self._records.clock(self._clock_object) if objects else 0.0
        kept, ended, known = KeptPages(), [], {}
        version = hashlib.sha256()
        for count, item in enumerate(objects, 1):
            found = self._cached.get(item.name)
            if found is None or found.etag != item.etag or not item.etag:
                found = self._parse(item)
                if count % READS_A_STEP == 0:
                    step(count)
            known[item.name] = found
            if found.parsed is None:
                unusable.append((item.name, found.problem))
            elif found.parsed.seconds > _age(item, now):
                kept.add(found.parsed.namespaces, found.parsed.hashes)
                version.update(f"{item.name} {item.etag}\n".encode())
            elif _OWN_NAME.fullmatch(self._name(item.name)):
                ended.append(item.name)
        with self._lock:
            self._cached = known
        self._warn(_unusable(unusable))
        pins = version.hexdigest()[:16] if len(kept) else ""
        return Look(kept, ended, _unusable(unusable), pins)

    def kept(self) -> KeptPages:
        """Return the pages of all pins that have not expired."""
        return self.look().kept

    def _list(self) -> tuple[list[ObjectInfo], list[tuple[str, str]]]:
        """Return the objects to read, smallest first, and the other objects with the reason."""
        listed = list(islice(self._bucket.objects(self._prefix), LISTED_LIMIT + 1))
        unusable: list[tuple[str, str]] = []
        if len(listed) > LISTED_LIMIT:
            unusable.append(
                (listed.pop().name, f"and all after it: more than {LISTED_LIMIT} objects")
            )
        objects, total = [], 0
        # Smallest first, so that a few huge objects do not crowd out many genuine pins.
        for item in sorted(listed, key=lambda item: (item.size, item.name)):
            name = self._name(item.name)
            if not item.name.endswith(".json") or "/" in name:
                unusable.append((item.name, "not a pin's name"))
            elif item.size > LIMIT:
                unusable.append((item.name, f"{item.size} bytes, more than {LIMIT}"))
            elif total + item.size > TOTAL_LIMIT:
                unusable.append(
                    (item.name, f"all pins together have more than {TOTAL_LIMIT} bytes")
                )
            else:
                total += item.size
                objects.append(item)
        return objects, unusable

    def _read(self, item: ObjectInfo) -> tuple[Pin | None, str]:
        """Return a pin, or None and the reason why the object is not one."""
        record = self._records.read(item.name, LIMIT)
        if record is None or record.content is None:
            return None, "removed or grown meanwhile"
        try:
            pin = msgspec.json.decode(record.content, type=Pin)
            _parsed(pin)
        except (ValueError, RecursionError) as error:  # also covers msgspec's exceptions
            return None, str(error) or type(error).__name__
        return pin, ""

    def _parse(self, item: ObjectInfo) -> _Cached:
        pin, problem = self._read(item)
        return _Cached(item.etag, _parsed(pin) if pin else None, problem)

    def _warn(self, unusable: Unusable) -> None:
        """Log and count unusable objects, once per change."""
        with self._lock:
            changed, self._reported = unusable != self._reported, unusable
        if unusable.objects and changed:
            fields = {"count": unusable.objects, "examples": list(unusable.examples)}
            self._count_unusable(unusable.objects)
            log.warning("invalid pins are ignored", extra={"fields": fields})

    def _name(self, path: str) -> str:
        return path.removeprefix(self._prefix).removesuffix(".json")

    def _object(self, name: str) -> str:
        return f"{self._prefix}{name}.json"


def _age(item: ObjectInfo, now: float) -> float:
    """Return the seconds since an object was written. `now` has whole seconds."""
    return now - item.modified // 1


def _parsed(pin: Pin) -> _Parsed:
    """Return the pages of a pin. Raises `ValueError` if it is not valid."""
    namespaces = frozenset(_digits(text, NAMESPACE_DIGEST_SIZE) for text in pin.namespaces)
    hashes = tuple(_digits(text, PAGE_HASH_SIZE) for text in pin.hashes)
    return _Parsed(namespaces, hashes, min(pin.seconds, LONGEST))


def _unusable(found: Sequence[tuple[str, str]]) -> Unusable:
    examples = tuple(f"{shown(name)} ({shown(why)})" for name, why in found[:NAMES_SHOWN])
    return Unusable(len(found), examples)


def _digits(text: str, size: int) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != size:
        raise ValueError(f"{shown(text)!r} does not have {2 * size} hex digits")
    return value
