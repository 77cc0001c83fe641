"""Namespaces: everything besides the tokens that determines the bytes of a page."""

import hashlib
from functools import cached_property
from typing import Annotated, Any

import msgspec

from memkv_sglang.page import NAMESPACE_DIGEST_SIZE

FORMAT_VERSION = 1
"""Version of the page format and of the meaning of page keys; part of every namespace."""

PAGE_BYTES_LIMIT = 1 << 30
"""Maximum `page_bytes` in a description."""

DESCRIPTION_LIMIT = 64 << 10
"""Maximum bytes of a description."""

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Text = Annotated[str, msgspec.Meta(max_length=16 << 10)]


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shard of the model that a page belongs to. Ranks start at 0."""

    tp_rank: Count = 0
    tp_size: Count = 1
    pp_rank: Count = 0
    pp_size: Count = 1
    cp_rank: Count = 0
    cp_size: Count = 1
    dcp_rank: Count = 0
    dcp_size: Count = 1


class Namespace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """A human-readable description of a set of pages; its digest is part of every page key.

    Stored next to the pages. Equal descriptions have equal digests on every node and in every
    process.
    """

    model: Text
    """Fingerprint of the model's config and weights; never a path or a served model name."""
    revision: Text = ""
    """Identifies weights that were updated at run time; empty for those loaded at startup."""
    pool: Text = "kv"
    """The model's memory pool: kv, indexer, mamba, draft, ..."""
    kv_dtype: Text
    """Element type of the stored KV, e.g. `bfloat16`."""
    layout: Text
    """Layout of a page's bytes, e.g. `page_first`."""
    page_size: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    """Tokens per page."""
    page_bytes: Annotated[int, msgspec.Meta(ge=1, le=PAGE_BYTES_LIMIT)]
    """Bytes per page, in all its buffers."""
    layers: tuple[Count, Count]
    """The layers in the page: from the first up to, but not including, the second."""
    heads: Count = 0
    """KV heads of the shard; 0 for pools without heads (MLA)."""
    head_size: Count = 0
    """Elements per head (per latent vector for MLA)."""
    shard: Shard = Shard()
    details: dict[Text, Text] = {}
    """Anything else that changes the bytes: quantization, KV scales, RoPE overrides, LoRA."""
    format_version: Count = FORMAT_VERSION

    @cached_property
    def description(self) -> bytes:
        """The namespace as canonical JSON: sorted keys, no whitespace, UTF-8."""
        return msgspec.json.encode(self, order="sorted")

    @cached_property
    def digest(self) -> bytes:
        """The first `NAMESPACE_DIGEST_SIZE` bytes of the description's SHA-256."""
        return hashlib.sha256(self.description).digest()[:NAMESPACE_DIGEST_SIZE]

    @classmethod
    def parse(cls, description: bytes) -> "Namespace":
        """Parse a description. Raises `msgspec.MsgspecError` if it is not valid."""
        if len(description) > DESCRIPTION_LIMIT:
            raise msgspec.DecodeError(f"{len(description)} bytes, more than {DESCRIPTION_LIMIT}")
        try:
            return msgspec.json.decode(description, type=cls)
        except (UnicodeDecodeError, RecursionError) as error:
            raise msgspec.DecodeError(f"not JSON, or nested too deeply: {error}") from None

    def differences(self, other: "Namespace") -> dict[str, tuple[Any, Any]]:
        """Return the fields that differ, each with this namespace's value and the other's."""
        mine, theirs = msgspec.structs.asdict(self), msgspec.structs.asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}
