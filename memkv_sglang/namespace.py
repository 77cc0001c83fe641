"""A namespace: everything that must be equal for two pages with one hash to hold the same bytes."""

import hashlib
from functools import cached_property
from typing import Annotated, Any

import msgspec

from memkv_sglang.page import NAMESPACE_DIGEST_SIZE

FORMAT_VERSION = 1
"""Version of what a page's bytes and its key mean; part of every namespace."""


PAGE_BYTES_LIMIT = 1 << 30
"""Bytes of the largest page that a description may name."""

DESCRIPTION_LIMIT = 64 << 10
"""Bytes of a description."""

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Text = Annotated[str, msgspec.Meta(max_length=16 << 10)]


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of the model that a page belongs to. Ranks count from 0."""

    tp_rank: Count = 0
    tp_size: Count = 1
    pp_rank: Count = 0
    pp_size: Count = 1
    cp_rank: Count = 0
    cp_size: Count = 1
    dcp_rank: Count = 0
    dcp_size: Count = 1


class Namespace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The readable description whose digest keys every page; stored beside the data it describes.

    Equal descriptions have equal digests, on every node and in every process.
    """

    model: Text
    """Content fingerprint of config and weights; never a path or a served name."""
    revision: Text = ""
    """Identity of the weights after an update at run time; empty for those loaded at start."""
    pool: Text = "kv"
    """Which pool of the model: kv, indexer, mamba, draft, ..."""
    kv_dtype: Text
    """Element type of the stored KV, e.g. `bfloat16`."""
    layout: Text
    """Layout of a page's bytes, e.g. `page_first`."""
    page_size: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    """Tokens a page."""
    page_bytes: Annotated[int, msgspec.Meta(ge=1, le=PAGE_BYTES_LIMIT)]
    """Bytes a page, over all its buffers."""
    layers: tuple[Count, Count]
    """First layer, and the one after the last, that the page covers."""
    heads: Count = 0
    """KV heads of the shard; 0 where the pool has none (MLA)."""
    head_size: Count = 0
    """Elements a head (of the latent vector for MLA)."""
    shard: Shard = Shard()
    details: dict[Text, Text] = {}
    """Whatever else changes the bytes: quantisation, KV scales, rope overrides, LoRA."""
    format_version: Count = FORMAT_VERSION

    @cached_property
    def description(self) -> bytes:
        """Canonical JSON: keys sorted, no whitespace, UTF-8."""
        return msgspec.json.encode(self, order="sorted")

    @cached_property
    def digest(self) -> bytes:
        """First `NAMESPACE_DIGEST_SIZE` bytes of the description's SHA-256."""
        return hashlib.sha256(self.description).digest()[:NAMESPACE_DIGEST_SIZE]

    @classmethod
    def parse(cls, description: bytes) -> "Namespace":
        """Read a description back; raises `msgspec.MsgspecError` if it is not one."""
        if len(description) > DESCRIPTION_LIMIT:
            raise msgspec.DecodeError(f"{len(description)} bytes, more than {DESCRIPTION_LIMIT}")
        try:
            return msgspec.json.decode(description, type=cls)
        except (UnicodeDecodeError, RecursionError) as error:
            raise msgspec.DecodeError(f"not JSON, or nested too deeply: {error}") from None

    def differences(self, other: "Namespace") -> dict[str, tuple[Any, Any]]:
        """Return the fields in which two namespaces differ, with both values."""
        mine, theirs = msgspec.structs.asdict(self), msgspec.structs.asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}
