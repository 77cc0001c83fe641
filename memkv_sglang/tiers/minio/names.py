"""The names of objects in the bucket, and the metadata that ties an object to its page."""

import re
from collections.abc import Iterable
from http import HTTPStatus
from urllib.parse import quote

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.namespace import FORMAT_VERSION
from memkv_sglang.page import (
    NAMESPACE_DIGEST_SIZE,
    PAGE_HASH_SIZE,
    Page,
    PageKey,
    spill_checksum,
)
from memkv_sglang.tiers.minio.http import (
    Framing,
    Metadata,
    ProtocolError,
    ResponseHead,
    UnreadableError,
)

_FORMAT_VERSION = b"%d" % FORMAT_VERSION

FORMAT = "x-amz-meta-memkv-format"
LENGTH = "x-amz-meta-memkv-length"
CHECKSUM = "x-amz-meta-memkv-checksum"
_OWN_FIELD = b"\r\nx-amz-meta-memkv-"

SSE = "x-amz-server-side-encryption"
SSE_KMS_KEY = "x-amz-server-side-encryption-aws-kms-key-id"

_CHECKSUM = re.compile(rb"[0-9a-f]{32}")

DESCRIPTION = "namespace.json"

_PAGE = re.compile(
    rf"([0-9a-f]{{{2 * NAMESPACE_DIGEST_SIZE}}})/([0-9a-f]{{2}})/([0-9a-f]{{{2 * PAGE_HASH_SIZE}}})"
)

_QUARANTINED = re.compile(
    rf"[0-9a-f]{{{2 * NAMESPACE_DIGEST_SIZE}}}/[0-9a-f]{{{2 * PAGE_HASH_SIZE}}}"
)
_NAMESPACE = re.compile(rf"[0-9a-f]{{{2 * NAMESPACE_DIGEST_SIZE}}}")

_AFTER_SLASH = "0"


class ObjectNames:
    """Builds and parses object names under a prefix. Names must be quoted in requests."""

    def __init__(self, prefix: str) -> None:
        """Use a prefix. An empty one means the root of the bucket."""
        self.root = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._quoted_root = quote(self.root)

    def page(self, key: PageKey) -> str:
        """Return the name of a page's object, in one of 256 folders per namespace."""
        digits = key.hash.hex()
        return f"{self.root}{key.namespace.hex()}/{digits[:2]}/{digits}"

    def page_paths(self, keys: Iterable[PageKey]) -> list[bytes]:
        """Return the quoted names of the objects of pages."""
        folders: dict[bytes, str] = {}
        paths = []
        for namespace, page_hash in keys:
            if (folder := folders.get(namespace)) is None:
                folder = folders[namespace] = f"{self._quoted_root}{namespace.hex()}/"
            digits = page_hash.hex()
            paths.append(f"{folder}{digits[:2]}/{digits}".encode())
        return paths

    def quarantine(self, key: PageKey) -> str:
        """Return the name of a corrupt page in the quarantine, which is outside its namespace."""
        return f"{self.quarantined}{key.namespace.hex()}/{key.hash.hex()}"

    @property
    def quarantined(self) -> str:
        """Prefix of quarantined pages."""
        return f"{self.root}quarantine/"

    @property
    def format(self) -> str:
        """Name of the format record, which every bucket of this project has."""
        return f"{self.root}memkv.json"

    @property
    def format_1(self) -> str:
        """Name of an object that buckets of format 1 have if they were ever collected."""
        return f"{self.root}collector/lease.json"

    @property
    def round(self) -> str:
        """Name of the record of the current collection."""
        return f"{self.root}collector/round.json"

    @property
    def logs(self) -> str:
        """Prefix of the nodes' logs."""
        return f"{self.root}logs/"

    @property
    def shards(self) -> str:
        """Prefix of the records of the index's shards."""
        return f"{self.root}shards/"

    @property
    def index(self) -> str:
        """Prefix of the parts of the index."""
        return f"{self.root}index/"

    @property
    def pins(self) -> str:
        """Prefix of the pins."""
        return f"{self.root}pins/"

    @property
    def probes(self) -> str:
        """Prefix of the objects that probes of the server write."""
        return f"{self.root}probe/"

    def is_quarantined(self, name: str) -> bool:
        """Return whether the name belongs to a quarantined page."""
        beyond = name.removeprefix(self.quarantined)
        return beyond != name and _QUARANTINED.fullmatch(beyond) is not None

    def past_foreign(self, name: str) -> str:
        """Return the name after which a listing should continue, to skip foreign folders."""
        folder, slash, _ = name.removeprefix(self.root).partition("/")
        own = _NAMESPACE.fullmatch(folder) or name.startswith(self.quarantined)
        return name if own or not slash else f"{self.root}{folder}{_AFTER_SLASH}"

    def page_key(self, name: str) -> PageKey | None:
        """Return the key of the page with this object name; None if it is no page's name."""
        if not name.startswith(self.root):
            return None
        match = _PAGE.fullmatch(name.removeprefix(self.root))
        if match is None or match[2] != match[3][:2]:
            return None
        return PageKey(bytes.fromhex(match[1]), bytes.fromhex(match[3]))

    def namespace(self, digest: bytes) -> str:
        """Prefix of all objects of a namespace."""
        return f"{self.root}{digest.hex()}/"

    def description(self, digest: bytes) -> str:
        """Name of the namespace's description."""
        return self.namespace(digest) + DESCRIPTION


def page_fields(page: Page) -> dict[str, str]:
    """Return the header fields for the PUT of a page. Reads the whole page.

    Raises `ChangedPageError`.
    """
    return {**size_fields(page.length), CHECKSUM: spill_checksum(page, page.buffers).hex()}


def size_fields(size: int) -> dict[str, str]:
    """Return the header fields of the PUT of a page, except for its checksum."""
    return {"content-length": str(size), FORMAT: str(FORMAT_VERSION), LENGTH: str(size)}


def stores_page(head: ResponseHead) -> bool:
    """Return whether a response to HEAD is that of a stored page.

    The status proves nothing, since a captive portal answers every request with 200. The response
    must also have the metadata of a page, which must agree with the object's length.
    """
    try:
        return (
            head.status == HTTPStatus.OK
            and head.field(FORMAT.encode()) == _FORMAT_VERSION
            and _length_agrees(head)
            and _CHECKSUM.fullmatch(head.field(CHECKSUM.encode()) or b"") is not None
        )
    except ProtocolError:  # the field is repeated
        return False


def _length_agrees(head: ResponseHead) -> bool:
    """Return whether the length in the metadata is that of the body, if the head declares one."""
    stored = head.field(LENGTH.encode()) or b""
    if head.framing is Framing.LENGTH:
        return stored == b"%d" % head.length
    return stored.isdigit()


def is_foreign(head: ResponseHead) -> bool:
    """Return whether a response lacks this project's metadata, or an object store's ETag.

    Such a response says nothing about the page, so no object may be quarantined because of it.
    """
    return _OWN_FIELD not in head.lower or not head.field(b"etag")


def is_stored(head: ResponseHead, body: bytes) -> bool:
    """Return whether a response to a PUT or a copy confirms that the object was stored.

    S3 returns an ETag. The status alone is not enough: a copy that fails after its response has
    started has status 200, too.
    """
    return bool(head.field(b"etag")) or b"<CopyObjectResult" in body


def metadata_mismatch(head: ResponseHead, page: Page) -> str | None:
    """Return why an object cannot be the page, given the response's head; None if it can.

    Raises `UnreadableError` for a valid object of another length, because the caller's page is
    wrong.
    """
    version = head.field(FORMAT.encode())
    if version != _FORMAT_VERSION:
        return f"format version {version!r}"
    stored = head.field(LENGTH.encode())
    if not _length_agrees(head):
        return f"{head.length} bytes, stored as {stored!r}"
    if stored != b"%d" % page.length:
        raise UnreadableError(f"{stored!r} bytes, asked for as {page.length}")
    return None


def is_ours(head: ResponseHead) -> bool:
    """Return whether an object was stored as a page, and not by other software."""
    return head.status == HTTPStatus.OK and head.field(FORMAT.encode()) is not None


def checksum_matches(head: ResponseHead, checksum: bytes) -> bool:
    """Return whether the checksum of the received bytes is the one stored with the page."""
    return head.field(CHECKSUM.encode()) == checksum.hex().encode()


def page_metadata() -> Metadata:
    """Return the metadata of a page in a response head, for the fast path."""
    return Metadata(
        prefix=_OWN_FIELD,
        lines=(b"\r\n%b: %b\r\n" % (FORMAT.encode(), _FORMAT_VERSION),),
        length=b"\r\n%b: " % LENGTH.encode(),
        checksum=b"\r\n%b: " % CHECKSUM.encode(),
    )


def server_side_encryption(config: MinioConfig) -> dict[str, str]:
    """Return the header fields of a PUT that request server-side encryption."""
    if config.sse == "none":
        return {}
    if config.sse == "s3":
        return {SSE: "AES256"}
    return {SSE: "aws:kms", SSE_KMS_KEY: config.sse_kms_key}
