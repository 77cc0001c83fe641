from collections.abc import Mapping, Sequence

from memkv_sglang.tiers.minio.http.bulk import (
    BulkTemplate,
    FallBack,
    Metadata,
    Request,
    Response,
    Sealing,
)
from memkv_sglang.tiers.minio.http.endpoints import Endpoint

class Batch:
    """The objects of one call. Several threads may transfer one batch.

    Requests are sent in order, signed with the template of the server. A server without a template
    gets no requests. The pages' memory is pinned until `close`. `fall_back`: see `ignore_fallback`.
    """

    def stop(self) -> None:
        """Send no further requests."""

    def close(self) -> None:
        """Release the pages' memory. Call it when no thread transfers any more. Idempotent."""

class Download(Batch):
    """Objects to receive into the memory of their pages."""

    def __init__(
        self,
        requests: Sequence[Request],
        templates: Mapping[Endpoint, BulkTemplate],
        metadata: Metadata,
        fall_back: FallBack = ...,
        *,
        sealing: Sealing | None = None,
    ) -> None:
        """Prepare GETs. With `sealing`, objects are decrypted in place while they are received.

        Raises `BufferError` for memory that cannot be written to.
        """

    def checksums(self) -> list[bytes | None]:
        """Return the checksum of each page whose metadata matched its content, else None."""

    def unverified(self) -> list[Response]:
        """Return the other responses of the pages' lengths; none with `sealing`."""

class Upload(Batch):
    """Pages to store. Their memory is only read."""

    def __init__(
        self,
        requests: Sequence[Request],
        templates: Mapping[Endpoint, BulkTemplate],
        fall_back: FallBack = ...,
        *,
        length: int,
        sealing: Sealing | None = None,
        memory: Sequence[bytearray] = (),
    ) -> None:
        """Prepare PUTs of pages with `length` bytes each, up to the first of another length.

        The template leaves the value of one field open, which becomes the object's checksum. With
        `sealing`, pages are encrypted into `memory`, one piece per connection, each large enough
        for a sealed page.
        """

    @property
    def started(self) -> int:
        """Number of pages, from the first, of which a part may have been sent."""

    def stored(self) -> list[bool]:
        """Return for each page of the batch whether the server confirmed that it stored it."""
