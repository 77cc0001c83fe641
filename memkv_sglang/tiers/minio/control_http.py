"""The HTTP that minio-py speaks for the control path: tried once, for a few seconds."""

import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from urllib3 import PoolManager

CONNECT_TIMEOUT = 2.0
"""Seconds to open a connection at most, whatever the settings allow for pages."""

READ_TIMEOUT = 5.0
"""Seconds that a server may think about a control request: a listing may take a while."""


def bounded_http(
    connect_timeout: float = CONNECT_TIMEOUT, context: ssl.SSLContext | None = None
) -> "PoolManager":
    """Return what minio-py sends requests by: each is tried once, for a few seconds."""
    import urllib3

    return urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=connect_timeout, read=READ_TIMEOUT),
        retries=urllib3.Retry(total=0),
        ssl_context=context,
    )
