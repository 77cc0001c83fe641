"""The server's clock, as its responses tell it (RFC 9110, IMF-fixdate: whole seconds)."""

from email.utils import parsedate_to_datetime
from functools import lru_cache

from memkv_sglang.tiers.minio.errors import ProtocolError
from memkv_sglang.tiers.minio.wire import ResponseHead


def server_time(head: ResponseHead) -> float:
    """Return when the server answered, in seconds of its clock. Raises `ProtocolError`."""
    return _parse(head.field(b"date"))


def modified_time(head: ResponseHead) -> float:
    """Return when an object was written last, likewise."""
    return _parse(head.field(b"last-modified"))


@lru_cache(1024)  # pages that were written together have one time
def _parse(date: bytes | None) -> float:
    try:
        return parsedate_to_datetime((date or b"").decode("latin-1")).timestamp()
    except (ValueError, OverflowError) as error:
        raise ProtocolError(f"no date: {date!r}") from error
