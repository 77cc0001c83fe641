"""What client and agent say to each other: msgpack messages, one request and one reply a time.

Messages are arrays that begin with the message's number; fields may be added at the end with a
default. Framing: see `wire`.

The handshake outlives every version: a frame with the array `[0, version, ...]` is answered by one
with `[32, version, ...]` or `[33, reason, ...]`. What follows the version differs from one version
to the next, so each side looks at the version first.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from memkv_sglang.engine.status import EngineStatus
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PAGE_HASH_SIZE, Buffer

PROTOCOL_VERSION = 4
"""Goes up with every change that the other side could misread."""

MAX_MESSAGE = 16 << 20
"""Bytes of an encoded message; a lookup of 4,096 pages has 130 KiB."""

MAX_PAGES = 4096
"""Pages of one load or spill; SGLang moves 128 at a time."""

MAX_BUFFERS = 256
"""Buffers of one page: K and V of 128 layers, each in a place of its own."""

MAX_HASHES = 65_536
"""Pages of a chain that is asked for: a million tokens with 16 a page."""

MAX_DESCRIPTION = 64 << 10
"""Bytes of a namespace's description; SGLang's have less than 1 KiB."""

PageBuffers = Annotated[
    Sequence[Annotated[Sequence[Buffer], Meta(max_length=MAX_BUFFERS)]],
    Meta(max_length=MAX_PAGES),
]
"""Bounded, since no other client is served while a list is decoded: 1.5 us a buffer."""

Hashes = Annotated[bytes, Meta(max_length=MAX_HASHES * PAGE_HASH_SIZE)]
"""Page hashes, one after the other."""

PageHashes = Annotated[bytes, Meta(max_length=MAX_PAGES * PAGE_HASH_SIZE)]
"""The same, of pages that are moved."""

Digest = Annotated[bytes, Meta(max_length=NAMESPACE_DIGEST_SIZE)]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=64)]
Name = Annotated[str, Meta(max_length=64)]

Seconds = Annotated[float, Meta(ge=0, le=7 * 24 * 3600)]
"""A length of time; neither NaN nor infinite, which no deadline would ever pass."""


class _Message(msgspec.Struct, array_like=True, tag=True):
    """Encoded as an array."""


class Hello(_Message, tag=0):
    """First message of a connection. An empty `session` opens one, a token joins one."""

    version: int
    session: Any = b""
    """Bytes; of any type, so that a Hello of another version can be decoded."""


class RegisterPool(_Message, tag=1):
    """Map the memory behind the one descriptor that comes along, as the session's pool `pool`."""

    pool: int
    length: int
    """Bytes."""


class ReleasePool(_Message, tag=2):
    """Forget a pool; its mapping ends with the last call that uses it."""

    pool: int


class Describe(_Message, tag=3):
    """Keep a namespace's description (its canonical JSON)."""

    description: Annotated[bytes, Meta(max_length=MAX_DESCRIPTION)]


class LookupPages(_Message, tag=4):
    """Find the longest prefix that can be loaded."""

    namespace: Digest
    hashes: Hashes
    budget: Seconds | None
    """Seconds; None for the agent's own setting."""
    recompute: tuple[Seconds, int] = (0.0, 0)
    """See `engine.recompute.Recompute`."""


class LoadPages(_Message, tag=5):
    """Fill pages of a chain. Until the reply their buffers belong to the agent."""

    namespace: Digest
    hashes: PageHashes
    buffers: PageBuffers
    """The buffers of each page."""


class SpillPages(_Message, tag=6):
    """Store pages of a chain. Until the reply their buffers belong to the agent."""

    namespace: Digest
    hashes: PageHashes
    buffers: PageBuffers
    before: Hashes
    """Hashes of the pages before the first, from the chain's start on."""


class Clear(_Message, tag=7):
    """Remove every page of a namespace."""

    namespace: Digest


class Flush(_Message, tag=8):
    """Wait until no page waits for upload."""

    timeout: Seconds
    """Seconds."""


class Status(_Message, tag=9):
    """Tell how the agent does."""


class Shutdown(_Message, tag=10):
    """End the agent as SIGTERM does."""


class CheckPages(_Message, tag=11):
    """Tell for each page whether it is there, which need not be monotone along a chain."""

    namespace: Digest
    hashes: Hashes
    budget: Seconds | None
    """Seconds; None for the agent's own setting."""
    tier: Name = ""
    """Where; empty for anywhere."""


class Settings(_Message, tag=12):
    """Tell the settings that the agent runs with."""

    nonce: Nonce
    """Key of the hashes that stand for secrets."""


class Join(_Message, tag=13):
    """Count this session as a client that needs this agent with its settings."""


class Retire(_Message, tag=14):
    """End the agent if a server started it and no client needs it."""


class WarmPages(_Message, tag=20):
    """Copy pages of a chain from the shared tier to this node's disk."""

    namespace: Digest
    hashes: Hashes


class Welcome(_Message, tag=32):
    """The connection belongs to this session from now on.

    Comes with the descriptor of the agent's `Lifetime`.

    The answer to a Hello of another version has the agent's version and an empty session; the agent
    then closes the connection.
    """

    version: int
    session: Any = b""
    """Bytes; of any type, as in `Hello`."""


class Refused(_Message, tag=33):
    """The request was not carried out; nothing was touched."""

    reason: str


class Done(_Message, tag=34):
    """Carried out; there is nothing to tell."""


class Described(_Message, tag=35):
    """The namespace's digest as the agent computed it."""

    digest: bytes


class FoundPages(_Message, tag=36):
    """Answer to `LookupPages`; see `tiers.base.Lookup`."""

    length: int
    complete: bool


class LoadedPages(_Message, tag=37):
    """Answer to `LoadPages`."""

    results: bytes
    """A `LoadResult` a page."""
    origins: bytes
    """A page's tier as an index into `tiers`; 255 for none."""
    tiers: list[str]


class SpilledPages(_Message, tag=38):
    """Answer to `SpillPages`."""

    results: bytes
    """A `SpillResult` a page."""


class Cleared(_Message, tag=39):
    """Answer to `Clear`."""

    pages: int
    complete: bool = True
    """False if a tier could not be reached, and may still hold pages."""


class Flushed(_Message, tag=40):
    """Answer to `Flush`."""

    empty: bool
    """False if time ran out with pages still waiting."""


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The agent as a process."""

    version: str
    """Of the distribution."""
    pid: int
    socket: str
    log: str
    """File that the agent logs to; empty if it logs to wherever its starter sent its stderr."""
    http_port: int
    uptime: float
    """Seconds."""
    sessions: int
    connections: int
    pools: int
    pool_bytes: int


class StatusReport(_Message, tag=41):
    """Answer to `Status`."""

    agent: AgentStatus
    engine: EngineStatus


class CheckedPages(_Message, tag=42):
    """Answer to `CheckPages`."""

    present: bytes
    """1 for a page that is there; 0 for one that is not, or could not be asked for in time."""


class SettingsReport(_Message, tag=43):
    """Answer to `Settings`."""

    values: dict[str, bool | int | float | str]
    """By key (`minio.bucket`), without secrets."""
    secrets: dict[str, bytes]
    """Keyed hashes of the secrets that are set."""


class WarmedPages(_Message, tag=52):
    """Answer to `WarmPages`: numbers of pages; see `engine.results.Warming`."""

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
    | Flush
    | Status
    | Shutdown
    | CheckPages
    | Settings
    | Join
    | Retire
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
    | WarmedPages
)

NO_TIER = 255
"""In `LoadedPages.origins`: the page was not loaded."""
