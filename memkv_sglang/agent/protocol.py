"""The protocol between client and agent: msgpack messages, one request and its reply at a time.

A message is an array that begins with the message's number. New fields go at the end, with a
default. `wire` defines the framing.

The handshake is the same in all versions: `[0, version, ...]` is answered by `[32, version, ...]`
or `[33, reason, ...]`. Later fields may differ, so each side checks the version first.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from memkv_sglang.engine.status import EngineStatus
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PAGE_HASH_SIZE, Buffer

PROTOCOL_VERSION = 5
"""Version of the protocol. Increase it with every change that another version could misread."""

MAX_MESSAGE = 16 << 20
"""Maximum bytes of an encoded message. A lookup of 4,096 pages has 130 KiB."""

MAX_PAGES = 4096
"""Maximum pages of one load or spill. SGLang moves 128 at a time."""

MAX_BUFFERS = 256
"""Maximum buffers of one page: separate K and V for 128 layers."""

MAX_HASHES = 65_536
"""Maximum pages of a lookup: a million tokens at 16 per page."""

MAX_DESCRIPTION = 64 << 10
"""Maximum bytes of a namespace description. SGLang's have less than 1 KiB."""

PageBuffers = Annotated[
    Sequence[Annotated[Sequence[Buffer], Meta(max_length=MAX_BUFFERS)]],
    Meta(max_length=MAX_PAGES),
]
"""The buffers of each page. Their number is limited, because decoding one holds the GIL for 1.5 us.
"""

Hashes = Annotated[bytes, Meta(max_length=MAX_HASHES * PAGE_HASH_SIZE)]
"""Concatenated page hashes."""

PageHashes = Annotated[bytes, Meta(max_length=MAX_PAGES * PAGE_HASH_SIZE)]
"""Concatenated page hashes of a load or spill."""

Digest = Annotated[bytes, Meta(max_length=NAMESPACE_DIGEST_SIZE)]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=64)]
Name = Annotated[str, Meta(max_length=64)]

Seconds = Annotated[float, Meta(ge=0, le=7 * 24 * 3600)]
"""A duration. Excludes NaN and infinity, which would make deadlines that never pass."""

MAX_REQUEST_ID = 128
"""Maximum characters of a request's id. SGLang's own have 32; clients may choose longer ones."""

RequestId = Annotated[str, Meta(max_length=MAX_REQUEST_ID)]

Tokens = Annotated[int, Meta(ge=0, le=1 << 20)]
"""Tokens of a page."""


class _Message(msgspec.Struct, array_like=True, tag=True):
    """Base of all messages."""


class Hello(_Message, tag=0):
    """First message of a connection. An empty `session` opens a session, a token joins one."""

    version: int
    session: Any = b""
    """Token of the session, in bytes. Declared as `Any`, so that a Hello of another version can be
    decoded."""


class RegisterPool(_Message, tag=1):
    """Map the memory of the attached descriptor as pool number `pool` of the session."""

    pool: int
    length: int
    """Bytes."""


class ReleasePool(_Message, tag=2):
    """Remove a pool. It is unmapped when the last call that uses it ends."""

    pool: int


class Describe(_Message, tag=3):
    """Store a namespace's description, its canonical JSON."""

    description: Annotated[bytes, Meta(max_length=MAX_DESCRIPTION)]


class LookupPages(_Message, tag=4):
    """Find the longest prefix that can be loaded."""

    namespace: Digest
    hashes: Hashes
    budget: Seconds | None
    """Seconds; None for the agent's own setting."""
    recompute: tuple[Seconds, int] = (0.0, 0)
    """See `engine.recompute.Recompute`."""
    request: RequestId = ""
    """The server's request that needs the pages, for the log."""


class LoadPages(_Message, tag=5):
    """Load pages of a chain. The agent owns the buffers until it replies."""

    namespace: Digest
    hashes: PageHashes
    buffers: PageBuffers
    """The buffers of each page."""
    served: tuple[RequestId, Tokens, Seconds] = ("", 0, 0.0)
    """See `engine.served.ServedRequest`."""


class SpillPages(_Message, tag=6):
    """Store pages of a chain. Until the reply their buffers belong to the agent."""

    namespace: Digest
    hashes: PageHashes
    buffers: PageBuffers
    before: Hashes
    """Hashes of the pages that precede the first, from the start of the sequence."""


class Clear(_Message, tag=7):
    """Delete all pages of a namespace."""

    namespace: Digest


class Hide(_Message, tag=21):
    """Treat a namespace's pages as missing on this node until they are stored again."""

    namespace: Digest


class Flush(_Message, tag=8):
    """Wait until the upload queue is empty."""

    timeout: Seconds
    """Seconds."""


class Status(_Message, tag=9):
    """Return the state of the agent and its tiers."""


class Shutdown(_Message, tag=10):
    """Stop the agent, as SIGTERM does."""


class Metrics(_Message, tag=15):
    """Ask for the agent's metrics."""


class CheckPages(_Message, tag=11):
    """Check for each page whether it is stored, regardless of earlier pages."""

    namespace: Digest
    hashes: Hashes
    budget: Seconds | None
    """Seconds; None for the agent's own setting."""
    tier: Name = ""
    """Tier to check; empty for all."""
    request: RequestId = ""
    """As in `LookupPages`."""


class Settings(_Message, tag=12):
    """Return the settings that the agent runs with."""

    nonce: Nonce
    """Key for the hashes that replace secrets."""


class Join(_Message, tag=13):
    """Count this session as a user of the agent, so that it is not retired."""


class Retire(_Message, tag=14):
    """Stop the agent if a server started it and no client uses it."""


class WarmPages(_Message, tag=20):
    """Copy pages of a chain from the shared tier to this node's disk."""

    namespace: Digest
    hashes: Hashes


class Welcome(_Message, tag=32):
    """Accepts a connection into a session. The agent's `Lifetime` descriptor is attached.

    The reply to a Hello of another version has the agent's version and an empty session; the agent
    then closes the connection.
    """

    version: int
    session: Any = b""
    """Token of the session, in bytes. Declared as `Any` for the same reason as in `Hello`."""


class Refused(_Message, tag=33):
    """The request was rejected and had no effect."""

    reason: str


class Done(_Message, tag=34):
    """The request succeeded and has no result."""


class Described(_Message, tag=35):
    """Reply to `Describe`, with the digest as computed by the agent."""

    digest: bytes


class FoundPages(_Message, tag=36):
    """Reply to `LookupPages`; see `tiers.base.Lookup`."""

    length: int
    complete: bool


class LoadedPages(_Message, tag=37):
    """Reply to `LoadPages`."""

    results: bytes
    """One `LoadResult` per page."""
    origins: bytes
    """Each page's tier as an index into `tiers`; 255 for none."""
    tiers: list[str]


class SpilledPages(_Message, tag=38):
    """Reply to `SpillPages`."""

    results: bytes
    """One `SpillResult` per page."""


class Cleared(_Message, tag=39):
    """Reply to `Clear` and `Hide`."""

    pages: int
    complete: bool = True
    """False if a tier could not be reached and may still hold pages."""


class Flushed(_Message, tag=40):
    """Reply to `Flush`."""

    empty: bool
    """False if the timeout came first."""


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """State of the agent process."""

    version: str
    """Version of sglang-memkv."""
    pid: int
    socket: str
    log: str
    """Log file; empty if the agent logs to the stderr that it was started with."""
    http_port: int
    metrics_url: str = ""
    uptime: float
    """Seconds."""
    sessions: int
    connections: int
    pools: int
    pool_bytes: int


class StatusReport(_Message, tag=41):
    """Reply to `Status`."""

    agent: AgentStatus
    engine: EngineStatus


class CheckedPages(_Message, tag=42):
    """Reply to `CheckPages`."""

    present: bytes
    """One byte per page: 1 if it is stored; 0 if not, or not checked in time."""


class SettingsReport(_Message, tag=43):
    """Reply to `Settings`."""

    values: dict[str, bool | int | float | str]
    """Values by key, such as `minio.bucket`, without secrets."""
    secrets: dict[str, bytes]
    """Keyed hashes of the secrets that are set, by key."""


class MetricsReport(_Message, tag=44):
    """Reply to `Metrics`."""

    text: str
    """Prometheus' text format."""


class WarmedPages(_Message, tag=52):
    """Reply to `WarmPages`: numbers of pages; see `engine.results.Warming`."""

    present: int
    copied: int
    missing: int
    refused: int


Request = (
    Hello
    | RegisterPool
    | ReleasePool
    | Describe
    | LookupPages
    | LoadPages
    | SpillPages
    | Clear
    | Hide
    | Flush
    | Status
    | Shutdown
    | CheckPages
    | Settings
    | Join
    | Retire
    | Metrics
    | WarmPages
)
Reply = (
    Welcome
    | Refused
    | Done
    | Described
    | FoundPages
    | LoadedPages
    | SpilledPages
    | Cleared
    | Flushed
    | StatusReport
    | CheckedPages
    | SettingsReport
    | MetricsReport
    | WarmedPages
)

NO_TIER = 255
"""Value in `LoadedPages.origins` for a page that was not loaded."""
