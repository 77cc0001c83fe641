"""A namespace: everything that must be equal for two pages with one hash to hold the same bytes."""

import hashlib
from functools import cached_property
from typing import Any

import msgspec

from memkv_sglang.page import NAMESPACE_DIGEST_SIZE

FORMAT_VERSION = 1
"""Version of what a page's bytes and its key mean; part of every namespace."""


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of the model that a page belongs to. Ranks count from 0."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    dcp_rank: int = 0
    dcp_size: int = 1


class Namespace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The readable description whose digest keys every page; stored beside the data it describes.

    Equal descriptions have equal digests, on every node and in every process.
    """

    model: str
    """Content fingerprint of config and weights; never a path or a served name."""
    revision: str = ""
    """Identity of the weights after an update at run time; empty for those loaded at start."""
    pool: str = "kv"
    """Which pool of the model: kv, indexer, mamba, draft, ..."""
    kv_dtype: str
    """Element type of the stored KV, e.g. `bfloat16`."""
    layout: str
    """Layout of a page's bytes, e.g. `page_first`."""
    page_size: int
    """Tokens a page."""
    page_bytes: int
    """Bytes a page, over all its buffers."""
    layers: tuple[int, int]
    """First layer, and the one after the last, that the page covers."""
    heads: int = 0
    """KV heads of the shard; 0 where the pool has none (MLA)."""
    head_size: int = 0
    """Elements a head (of the latent vector for MLA)."""
    shard: Shard = Shard()
    details: dict[str, str] = {}
    """Whatever else changes the bytes: quantisation, KV scales, rope overrides, LoRA."""
    format_version: int = FORMAT_VERSION

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
        try:
            return msgspec.json.decode(description, type=cls)
        except UnicodeDecodeError as error:
            raise msgspec.DecodeError(f"no UTF-8: {error}") from None
        except RecursionError:
            raise msgspec.DecodeError("nested too deeply") from None

    def differences(self, other: "Namespace") -> dict[str, tuple[Any, Any]]:
        """Return the fields in which two namespaces differ, with both values."""
        mine, theirs = msgspec.structs.asdict(self), msgspec.structs.asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}
