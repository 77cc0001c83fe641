"""HTTP to S3 servers: framing, connections, TLS, deadlines and error texts."""

from memkv_sglang.tiers.minio.http.answers import shown
from memkv_sglang.tiers.minio.http.background import BackgroundCall
from memkv_sglang.tiers.minio.http.bulk import (
    FALLBACK_REASONS,
    BulkTemplate,
    Metadata,
    Request,
    Response,
    Sealing,
)
from memkv_sglang.tiers.minio.http.connection import Connection
from memkv_sglang.tiers.minio.http.endpoints import Endpoint, parse_endpoints
from memkv_sglang.tiers.minio.http.errors import (
    ClosedError,
    OutOfTimeError,
    ProtocolError,
    StaleError,
    StatusError,
    TransferError,
    UnreadableError,
)
from memkv_sglang.tiers.minio.http.explain import (
    PERMISSIONS,
    control_error,
    is_html,
    refused,
    unusable_answer,
)
from memkv_sglang.tiers.minio.http.framing import Framing, ResponseHead, parse_head
from memkv_sglang.tiers.minio.http.pool import ConnectionPool, Server
from memkv_sglang.tiers.minio.http.times import ServerClock, is_plausible, modified_time
from memkv_sglang.tiers.minio.http.tls import tls_context

__all__ = [
    "FALLBACK_REASONS",
    "PERMISSIONS",
    "BackgroundCall",
    "BulkTemplate",
    "ClosedError",
    "Connection",
    "ConnectionPool",
    "Endpoint",
    "Framing",
    "Metadata",
    "OutOfTimeError",
    "ProtocolError",
    "Request",
    "Response",
    "ResponseHead",
    "Sealing",
    "Server",
    "ServerClock",
    "StaleError",
    "StatusError",
    "TransferError",
    "UnreadableError",
    "control_error",
    "is_html",
    "is_plausible",
    "modified_time",
    "parse_endpoints",
    "parse_head",
    "refused",
    "shown",
    "tls_context",
    "unusable_answer",
]
