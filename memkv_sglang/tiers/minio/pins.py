"""Pins: chains that no collector removes for a while, each a small object in the bucket."""

import hashlib
import logging
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PAGE_HASH_SIZE, PageKey
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.bucket import Bucket
from memkv_sglang.tiers.minio.objects import ObjectNames
from memkv_sglang.tiers.minio.records import LIMIT, Records

log = logging.getLogger(__name__)


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """A chain to keep, in each of some namespaces (a model's ranks and pools)."""

    namespaces: Sequence[str]
    """Digests, in hex."""
    hashes: Sequence[str]
    """Page hashes, in hex, from the chain's start."""
    seconds: float
    """How long it holds, from its writing on."""
    note: str = ""
    """What for, in the words of whoever made it."""

    @property
    def name(self) -> str:
        """What it is called: equal chains have equal names, so that pinning again renews."""
        return hashlib.sha256("/".join([*self.namespaces, *self.hashes]).encode()).hexdigest()[:16]

    def keys(self) -> list[PageKey]:
        """Return the pages; raises `ValueError` if it is no valid pin."""
        namespaces = [_digits(text, NAMESPACE_DIGEST_SIZE) for text in self.namespaces]
        hashes = [_digits(text, PAGE_HASH_SIZE) for text in self.hashes]
        return [PageKey(namespace, page) for namespace in namespaces for page in hashes]


class StoredPin(NamedTuple):
    """A pin as the bucket has it."""

    name: str
    pin: Pin
    left: float
    """Seconds until it ends, by the server's clock; none are left if not positive."""


class PinStore:
    """The pins of a bucket. Calls block and raise `TierError`."""

    def __init__(self, bucket: Bucket, records: Records, names: ObjectNames) -> None:
        """Keep pins beside the pages under the prefix of `names`."""
        self._bucket = bucket
        self._records = records
        self._prefix = names.pins

    def add(self, pin: Pin) -> None:
        """Keep a chain from now on, or for longer than before."""
        name = self._object(pin.name)
        content = msgspec.json.encode(pin)
        if len(content) > LIMIT:
            raise TierError(
                f"the pin has {len(pin.hashes)} pages, which make {len(content)} bytes of at most "
                f"{LIMIT}; pin a shorter prefix, or choose one namespace"
            )
        before = self._records.read(name)
        if self._records.write(name, content, before.version if before else None) is None:
            raise TierError("the pin was changed by somebody else just now; try again")

    def remove(self, name: str) -> bool:
        """Let a chain go; False if there was no such pin."""
        there = self._records.read(self._object(name)) is not None
        if there:
            self._bucket.remove([self._object(name)])
        return there

    def all(self) -> list[StoredPin]:
        """Read every pin, those that have ended too; what is not one is left out, with a line."""
        found = []
        for path in self._bucket.names(self._prefix, recursive=True):
            record = self._records.read(path)
            if record is None:
                continue
            try:
                pin = msgspec.json.decode(record.content, type=Pin)
                pin.keys()
            except ValueError as error:  # also msgspec's
                log.warning("no pin", extra={"fields": {"object": path, "error": str(error)}})
                continue
            name = path.removeprefix(self._prefix).removesuffix(".json")
            found.append(StoredPin(name, pin, pin.seconds - record.age))
        return found

    def kept(self) -> frozenset[PageKey]:
        """Return the pages of all pins that hold."""
        holding = (stored.pin for stored in self.all() if stored.left > 0)
        return frozenset(key for pin in holding for key in pin.keys())

    def _object(self, name: str) -> str:
        return f"{self._prefix}{name}.json"


def _digits(text: str, size: int) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != size:
        raise ValueError(f"{text[:70]!r} has not {2 * size} hex digits")
    return value
