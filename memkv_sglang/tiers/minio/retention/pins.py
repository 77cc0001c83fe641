"""Pins: chains that no collector removes for a while, each a small object in the bucket.

Anybody who may write to the bucket may write anything under `pins/`. So everything here has a
limit, and what is not read is reported: see `Odd`.
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
"""Objects under `pins/` that are looked at: twenty requests."""

TOTAL_LIMIT = 32 << 20
"""Bytes of all pins that are read: the hashes of half a million pages, which take 80 MB then."""

NAMES_SHOWN = 5
"""Objects that a report names."""

LONGEST = 36500 * 86400.0
"""Seconds that a pin holds at most, whatever it says."""

NOTE_LIMIT = 1000
"""Characters of a note."""

READS_A_STEP = 100
"""Pins read between two steps."""

_OWN_NAME = re.compile("[0-9a-f]{16}")


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """A chain to keep, in each of some namespaces (a model's ranks and pools)."""

    namespaces: Sequence[str]
    """Digests, in hex."""
    hashes: Sequence[str]
    """Page hashes, in hex, from the chain's start."""
    seconds: float
    """How long it holds, from its writing on."""
    note: Annotated[str, msgspec.Meta(max_length=NOTE_LIMIT)] = ""
    """What for, in the words of whoever made it."""

    @property
    def name(self) -> str:
        """What it is called: equal chains have equal names, so that pinning again renews."""
        return hashlib.sha256("/".join([*self.namespaces, *self.hashes]).encode()).hexdigest()[:16]


class StoredPin(NamedTuple):
    """A pin as the bucket has it."""

    name: str
    pin: Pin
    left: float
    """Seconds until it ends, by the server's clock; none are left if not positive."""


class Odd(NamedTuple):
    """What is under `pins/` but was not read. If it was meant as a pin, it keeps nothing."""

    objects: int = 0
    examples: tuple[str, ...] = ()
    """Some of the names with the reason, as they can be printed."""

    @property
    def text(self) -> str:
        """One line for people; empty if there is nothing odd."""
        if not self.objects:
            return ""
        more = ", ..." if self.objects > len(self.examples) else ""
        examples = ", ".join(self.examples)
        return f"objects under pins/ that keep nothing: {self.objects}: {examples}{more}"


class KeptPages(Collection[PageKey]):
    """The pages of pins, in memory that grows with the pins' size, not with how many they name."""

    def __init__(self) -> None:
        """Begin with none."""
        self._namespaces: dict[bytes, list[frozenset[bytes]]] = {}
        """By page hash, those of each pin that names it."""
        self._length = 0

    def add(self, namespaces: frozenset[bytes], hashes: Collection[bytes]) -> None:
        """Keep the pages of a chain in some namespaces."""
        for page in hashes:
            self._namespaces.setdefault(page, []).append(namespaces)
        self._length += len(namespaces) * len(hashes)

    def __contains__(self, key: object) -> bool:
        """Tell whether a `PageKey` is among them."""
        if not isinstance(key, PageKey) or key.hash not in self._namespaces:
            return False  # as for most of the many pages that an eviction asks for
        return any(key.namespace in namespaces for namespaces in self._namespaces[key.hash])

    def __len__(self) -> int:
        """Return how many there are at most: pages of several pins count several times."""
        return self._length

    def __iter__(self) -> Iterator[PageKey]:
        for page, pins in self._namespaces.items():
            for namespace in frozenset().union(*pins):
                yield PageKey(namespace, page)


class _Parsed(NamedTuple):
    """A pin as it is kept in memory."""

    namespaces: frozenset[bytes]
    hashes: tuple[bytes, ...]
    seconds: float


class _Known(NamedTuple):
    """What an object was found to be, for as long as it is not written again."""

    etag: str
    parsed: _Parsed | None
    problem: str


class Look(NamedTuple):
    """The pins of one moment."""

    kept: KeptPages
    ended: list[str]
    """Names of objects of ours that keep nothing any more."""
    odd: Odd


class PinStore:
    """The pins of a bucket. Thread-safe; calls block and raise `TierError`."""

    def __init__(
        self,
        bucket: Bucket,
        records: Records,
        names: ObjectNames,
        *,
        count_odd: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Keep pins beside the pages under the prefix of `names`.

        `count_odd` is called with the number of odd objects when they have changed.
        """
        self._count_odd = count_odd
        self._bucket = bucket
        self._records = records
        self._lease = names.lease
        self._prefix = names.pins
        self._known: dict[str, _Known] = {}
        self._reported = Odd()
        self._lock = threading.Lock()

    def add(self, pin: Pin) -> None:
        """Keep a chain from now on, or for longer than before."""
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
            raise TierError("the pin was changed by somebody else just now; try again")

    def remove(self, name: str) -> bool:
        """Let a chain go; False if there was no such pin."""
        there = self._records.read(self._object(name), 0) is not None
        if there:
            self._bucket.remove([self._object(name)])
        return there

    def all(self) -> list[StoredPin]:
        """Read every pin, those that have ended too."""
        return self.report()[0]

    def report(self) -> tuple[list[StoredPin], Odd]:
        """Read every pin, those that have ended too, and tell what was not read."""
        now = self._records.clock(self._lease)
        objects, odd = self._list()
        found = []
        for item in objects:
            pin, problem = self._read(item)
            if pin is None:
                odd.append((item.name, problem))
            else:
                left = min(pin.seconds, LONGEST) - _age(item, now)
                found.append(StoredPin(self._name(item.name), pin, left))
        return sorted(found), _odd(odd)

    def look(self, now: float | None = None, step: Callable[[int], None] = lambda _: None) -> Look:
        """Return what the pins that hold keep; reads only what changed since the last time.

        `now` is the server's time, if it is known. `step` is called now and then with how many
        pins were read.
        """
        now = self._records.clock(self._lease) if now is None else now
        objects, odd = self._list()
        kept, ended, known = KeptPages(), [], {}
        for count, item in enumerate(objects, 1):
            found = self._known.get(item.name)
            if found is None or found.etag != item.etag or not item.etag:
                found = self._parse(item)
                if count % READS_A_STEP == 0:
                    step(count)
            known[item.name] = found
            if found.parsed is None:
                odd.append((item.name, found.problem))
            elif found.parsed.seconds > _age(item, now):
                kept.add(found.parsed.namespaces, found.parsed.hashes)
            elif _OWN_NAME.fullmatch(self._name(item.name)):
                ended.append(item.name)
        with self._lock:
            self._known = known
        self._warn(_odd(odd))
        return Look(kept, ended, _odd(odd))

    def kept(self) -> KeptPages:
        """Return the pages of all pins that hold."""
        return self.look().kept

    def _list(self) -> tuple[list[ObjectInfo], list[tuple[str, str]]]:
        """Return the objects to read, the smallest ones first, and those not to read."""
        listed = list(islice(self._bucket.objects(self._prefix), LISTED_LIMIT + 1))
        odd: list[tuple[str, str]] = []
        if len(listed) > LISTED_LIMIT:
            odd.append((listed.pop().name, f"and all after it: more than {LISTED_LIMIT} objects"))
        objects, total = [], 0
        # The smallest first: a few huge ones must not crowd out many that people made.
        for item in sorted(listed, key=lambda item: (item.size, item.name)):
            name = self._name(item.name)
            if not item.name.endswith(".json") or "/" in name:
                odd.append((item.name, "not a pin's name"))
            elif item.size > LIMIT:
                odd.append((item.name, f"{item.size} bytes, more than {LIMIT}"))
            elif total + item.size > TOTAL_LIMIT:
                odd.append((item.name, f"all pins together have more than {TOTAL_LIMIT} bytes"))
            else:
                total += item.size
                objects.append(item)
        return objects, odd

    def _read(self, item: ObjectInfo) -> tuple[Pin | None, str]:
        """Return a pin, or why it is none."""
        record = self._records.read(item.name, LIMIT)
        if record is None or record.content is None:
            return None, "gone, or grown meanwhile"
        try:
            pin = msgspec.json.decode(record.content, type=Pin)
            _parsed(pin)
        except (ValueError, RecursionError) as error:  # also msgspec's
            return None, str(error) or type(error).__name__
        return pin, ""

    def _parse(self, item: ObjectInfo) -> _Known:
        pin, problem = self._read(item)
        return _Known(item.etag, _parsed(pin) if pin else None, problem)

    def _warn(self, odd: Odd) -> None:
        """Log and count what is odd, once for each change."""
        with self._lock:
            changed, self._reported = odd != self._reported, odd
        if odd.objects and changed:
            fields = {"count": odd.objects, "examples": list(odd.examples)}
            self._count_odd(odd.objects)
            log.warning("objects under pins/ keep nothing", extra={"fields": fields})

    def _name(self, path: str) -> str:
        return path.removeprefix(self._prefix).removesuffix(".json")

    def _object(self, name: str) -> str:
        return f"{self._prefix}{name}.json"


def _age(item: ObjectInfo, now: float) -> float:
    """Return the seconds since an object was written; `now` is told in whole ones."""
    return now - item.modified // 1


def _parsed(pin: Pin) -> _Parsed:
    """Return a pin's pages; raises `ValueError` if it is no valid pin."""
    namespaces = frozenset(_digits(text, NAMESPACE_DIGEST_SIZE) for text in pin.namespaces)
    hashes = tuple(_digits(text, PAGE_HASH_SIZE) for text in pin.hashes)
    return _Parsed(namespaces, hashes, min(pin.seconds, LONGEST))


def _odd(found: Sequence[tuple[str, str]]) -> Odd:
    examples = tuple(f"{shown(name)} ({shown(why)})" for name, why in found[:NAMES_SHOWN])
    return Odd(len(found), examples)


def _digits(text: str, size: int) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != size:
        raise ValueError(f"{shown(text)!r} has not {2 * size} hex digits")
    return value
