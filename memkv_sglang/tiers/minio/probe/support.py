"""What an S3 server supports, as probes have found."""

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from memkv_sglang.finding import Finding

NEW = {"if-none-match": "*"}
"""Header fields of a write that must not replace an existing object."""


class Conditions(Enum):
    """Whether conditional writes work (`If-Match`, `If-None-Match: *`), and in which form."""

    QUOTED = "quoted"
    """They work with the ETag in quotes, as in RFC 9110."""
    BARE = "bare"
    """They work with the ETag without quotes (Ceph RGW)."""
    NONE = "none"
    """They do not work: the server ignores them, or lets several concurrent writers win."""

    def fields(self, etag: str | None) -> Mapping[str, str]:
        """Return the header fields of a write that replaces the version `etag`.

        None creates a new object. `etag` may be quoted. Raises `ValueError` for `NONE`: such a
        write would be unconditional.
        """
        if self is Conditions.NONE:
            raise ValueError("this server has no conditional writes")
        if etag is None:
            return NEW
        bare = etag.strip('"')
        return {"if-match": bare if self is Conditions.BARE else f'"{bare}"'}


class ServerSupport(NamedTuple):
    """What the server of one bucket supports, as measured. Valid until the server is replaced."""

    conditions: Conditions
    """Which form of conditional writes to use. With `NONE`, no lease excludes another node."""
    copy_renews: bool
    """Whether copying an object onto itself updates its LastModified.

    If not, only storing an object again protects it from a lifecycle rule that expires by age.
    """
    versioned: bool
    """Whether the bucket keeps the previous versions of objects."""
    keep_alive: bool
    """Whether the server answers several requests per connection."""
    findings: tuple[Finding, ...]
    """One line per probe, including those that passed."""

    @property
    def exclusive(self) -> bool:
        """Whether a lease on this server excludes other nodes."""
        return self.conditions is not Conditions.NONE
