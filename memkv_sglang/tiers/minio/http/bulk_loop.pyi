from collections.abc import Sequence

from memkv_sglang.tiers.minio.http.bulk_batch import Batch
from memkv_sglang.tiers.minio.http.connection import Connection

def transfer(
    connections: Sequence[Connection], batch: Batch, deadline: float, stall_timeout: float
) -> None:
    """Send the batch's requests and receive the responses until there are no more requests.

    Accepts only objects of their page's length, or confirmations that an object was stored. Any
    other response is reported to `fall_back` and ends the requests; its connection is closed unless
    the response was read completely. A reused connection that stays silent for its `patience` is
    marked as stale and closed, and the others continue. Blocks until `deadline` at most. Raises
    `OutOfTimeError`, or `StallError` once no connection has moved a byte for `stall_timeout`
    seconds, and closes the connections with a request in flight.
    """
