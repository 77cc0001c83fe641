from collections.abc import Sequence

from memkv_sglang.tiers.minio.http.connection import Connection
from memkv_sglang.tiers.minio.objects.bulk import Source

def receive(
    connections: Sequence[Connection], source: Source, deadline: float, stall_timeout: float
) -> None:
    """Send requests and receive responses until there are no more.

    A response that is anything but an object of the right length is not delivered, and its
    connection closed where it is not sure to be in step. So is a reused connection that has not
    sent a byte after its `patience`; it is marked as stale. Blocks until `deadline` at most. Raises
    `OutOfTimeError`, or `StallError` once nothing has moved on any connection for `stall_timeout`
    seconds, and closes those that still had a request under way.
    """
