from collections.abc import Mapping, Sequence

from memkv_sglang.tiers.minio.http.bulk import (
    BulkTemplate,
    FallBack,
    Metadata,
    Request,
    Response,
    Sealing,
)
from memkv_sglang.tiers.minio.http.connection import Connection
from memkv_sglang.tiers.minio.http.endpoints import Endpoint

class Batch:
    """The objects of one call. Several threads may receive one batch."""

    def __init__(
        self,
        requests: Sequence[Request],
        templates: Mapping[Endpoint, BulkTemplate],
        metadata: Metadata,
        fall_back: FallBack = ...,
        *,
        sealing: Sealing | None = None,
    ) -> None:
        """Prepare to send the requests in order, signed with the template of the server.

        A server without a template gets no requests. Pins the pages' memory until `close`. With
        `sealing`, objects are decrypted in place while they are received. `fall_back`: see
        `ignore_fallback`. Raises `BufferError` for memory that cannot be written to.
        """

    def stop(self) -> None:
        """Send no further requests."""

    def close(self) -> None:
        """Release the pages' memory. Call it when no thread receives any more. Idempotent."""

    def checksums(self) -> list[bytes | None]:
        """Return the checksum of each page whose metadata matched its content, else None."""

    def unverified(self) -> list[Response]:
        """Return the other responses of the pages' lengths; none with `sealing`."""

def receive(
    connections: Sequence[Connection], batch: Batch, deadline: float, stall_timeout: float
) -> None:
    """Send the batch's requests and receive the responses until there are no more requests.

    Accepts only objects of their page's length. Any other response is reported to `fall_back` and
    ends the requests; its connection is closed unless the response was read completely. A reused
    connection that stays silent for its `patience` is marked as stale and closed, and the others
    continue. Blocks until `deadline` at most. Raises `OutOfTimeError`, or `StallError` once no
    connection has moved a byte for `stall_timeout` seconds, and closes the connections with a
    request in flight.
    """
