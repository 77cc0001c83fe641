"""Every setting with its default, unit, range and description. Nothing else defines settings.

Sizes are in bytes, times in seconds. Files, variables and flags may use units: `100GiB`, `250ms`.
"""

from typing import Annotated, Any, Literal, get_origin

from msgspec import Meta, Struct
from msgspec.structs import FieldInfo, fields, replace

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

BYTES = {"unit": "bytes"}
SECONDS = {"unit": "seconds"}
PATH = {"unit": "path"}
PATHS = {"unit": "paths"}
SECRET = {"secret": True}
SHARDS = {"unit": "shards"}

REDACTED = "(secret)"
"""Printed instead of a secret."""


def split_paths(text: str) -> list[str]:
    """Return the paths of a setting with the unit `paths`."""
    return [path for part in text.split(",") if (path := part.strip())]


def field_meta(field: FieldInfo) -> Meta:
    """Return the field's range, unit and description."""
    if get_origin(field.type) is not Annotated:
        return Meta()
    meta: Meta = field.type.__metadata__[0]
    return meta


class Section(Struct, frozen=True):
    """A group of settings. Its `repr` hides secrets, so logs and tracebacks never show them."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(field.name, self._shown(field)) for field in fields(self)]

    def __repr__(self) -> str:
        items = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({items})"

    def _shown(self, field: FieldInfo) -> Any:
        value = getattr(self, field.name)
        return REDACTED if value and field_meta(field).extra == SECRET else value


class AgentConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The node agent's process."""

    socket: Annotated[
        str,
        Meta(
            extra=PATH,
            description="Unix socket on which the agent serves this node's SGLang servers. Empty: "
            "`agent.sock` in `/run/memkv` if that directory belongs to this user, as the service's "
            "does; otherwise in `$XDG_RUNTIME_DIR/memkv`, or in `/tmp/memkv-UID` if that is not "
            "set.",
        ),
    ] = ""
    autostart: Annotated[
        bool,
        Meta(
            description="Whether a server starts an agent if none is running. Turn it off where "
            "the agent is a service or runs in another container. A server then needs no other "
            "settings.",
        ),
    ] = True
    http_port: Annotated[
        int,
        Meta(
            ge=0,
            le=65535,
            description="Port for `/livez`, `/readyz` and `/metrics`. 0: any free port; "
            "`memkv stats` shows it.",
        ),
    ] = 0
    http_address: Annotated[
        str,
        Meta(
            description="Address for this port. Other machines reach it unless it is a loopback "
            "address; `0.0.0.0` or `::` means every interface.",
        ),
    ] = "127.0.0.1"
    http_cert_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="PEM file with the certificate for this port, followed by its "
            "intermediates. Requires `http_key_file`. A changed file takes effect within seconds. "
            "Empty: plain http.",
        ),
    ] = ""
    http_key_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="PEM file with the private key of `http_cert_file`, without a password. "
            "Other users must not have access to it.",
        ),
    ] = ""
    http_token_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="File with a token that requests for `/metrics` must send "
            "(`Authorization: Bearer ...`). Probes need none. Other users must not have access to "
            "it. A changed file takes effect within seconds. Empty: no token.",
        ),
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(
            description="Minimum level of logged events. Single pages are logged only at `debug`."
        ),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        Meta(
            description="Format of log lines: `text` is logfmt, `json` one object per line. An "
            "SGLang server also writes this project's lines as JSON, to its stderr.",
        ),
    ] = "text"
    log_requests: Annotated[
        Literal["none", "slow", "all"],
        Meta(
            description="Requests whose lookups and loads are logged, for `memkv explain`. "
            "`slow`: those that wait for 100 ms or longer in total.",
        ),
    ] = "slow"
    drain_timeout: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            extra=SECONDS,
            description="How long the agent keeps uploading after SIGTERM. The next start uploads "
            "what is left.",
        ),
    ] = 10.0
    idle_timeout: Annotated[
        float,
        Meta(
            ge=0,
            extra=SECONDS,
            description="An agent that a server started exits after this long without clients, "
            "once its upload queue is empty. 0: never. An agent started by hand or as a service "
            "stays.",
        ),
    ] = 60.0
    oom_score_adj: Annotated[
        int,
        Meta(
            ge=-1000,
            le=1000,
            description="How readily the kernel kills the agent when memory runs out: -1000 is "
            "never, 1000 is first. Lowering it needs CAP_SYS_RESOURCE. 0: keep what the agent "
            "inherits.",
        ),
    ] = 0


class EngineConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lookups, loads, spills and the upload queue."""

    lookup_budget: Annotated[
        float,
        Meta(
            gt=0,
            le=4.0,
            extra=SECONDS,
            description="Time limit of a lookup. When it expires, the lookup returns the prefix "
            "found so far.",
        ),
    ] = 0.1
    batch_deadline: Annotated[
        float,
        Meta(
            gt=0,
            le=5.0,
            extra=SECONDS,
            description="Time limit of a load or spill call. Pages not done by then are misses.",
        ),
    ] = 5.0
    skip_slow_loads: Annotated[
        bool,
        Meta(
            description="Skip pages that would take longer to load than to recompute, at the "
            "tiers' current speed.",
        ),
    ] = True
    prefill_speed: Annotated[
        float,
        Meta(
            ge=0,
            description="Prefill speed of this node's servers in tokens per second, used to "
            "decide whether a load beats recomputation. 0: measure it.",
        ),
    ] = 0.0
    upload: Annotated[
        Literal["always", "second_use", "before_eviction"],
        Meta(
            description="When to copy a page from this node's disk to the shared tier. `always`: "
            "right after it is spilled, so that any node can continue a conversation. "
            "`second_use`: once this node uses it again. `before_eviction`: when pages that were "
            "not copied fill half of the disk, oldest first. The latter two save uploads and cost "
            "hits on other nodes; they need `admission` = `always`.",
        ),
    ] = "always"
    namespace_salt: Annotated[
        str,
        Meta(
            max_length=256,
            description="Part of every page's name. Servers share pages only if theirs is equal; "
            "change it to start over, for instance after KV that a faulty release computed.",
        ),
    ] = ""
    upload_backlog: Annotated[
        int,
        Meta(
            gt=0,
            extra=BYTES,
            description="Maximum size of pages waiting for upload. When it is reached, new pages "
            "are stored only on this node.",
        ),
    ] = 16 * GIB
    upload_attempts: Annotated[
        int,
        Meta(
            ge=1,
            le=1000,
            description="Upload attempts per page before it is dropped from the queue. Waiting "
            "for an open circuit breaker does not count.",
        ),
    ] = 5
    admission: Annotated[
        Literal["always", "second_use"],
        Meta(
            description="When to write a spilled page to this node's disk. `second_use`: when the "
            "page is first loaded; until then only the shared tier stores it. That saves disk "
            "writes but acknowledges spills later. `promote` then counts the spill as the first "
            "use."
        ),
    ] = "always"
    promote: Annotated[
        Literal["never", "second_use", "always"],
        Meta(
            description="When to copy a page loaded from the shared tier to this node's disk. "
            "`second_use`: when this node loads it for the second time."
        ),
    ] = "second_use"
    promote_buffer: Annotated[
        int,
        Meta(
            gt=0,
            extra=BYTES,
            description="Memory for pages being promoted to this node's disk. When it is full, "
            "pages are not promoted.",
        ),
    ] = 128 * MIB
    breaker_failures: Annotated[
        int,
        Meta(ge=1, le=1000, description="Consecutive failures that open the circuit breaker."),
    ] = 5
    breaker_cooldown: Annotated[
        float,
        Meta(
            gt=0,
            le=600,
            extra=SECONDS,
            description="How long an open circuit breaker waits before it lets one call through.",
        ),
    ] = 2.0


class NvmeConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cache tier on this node's disks."""

    directory: Annotated[
        str,
        Meta(
            extra=PATHS,
            description="Directory for pages. For several disks, give one directory on each, "
            "separated by commas (or a list in a file). Agents cannot share one. "
            "Empty: no NVMe tier.",
        ),
    ] = ""
    capacity: Annotated[
        int,
        Meta(
            ge=MIB,
            extra=BYTES,
            description="Disk space for pages and the tier's other files, per directory. Must not "
            "exceed the size of the file system.",
        ),
    ] = 100 * GIB
    segment_size: Annotated[
        int,
        Meta(
            ge=MIB,
            le=64 * GIB,
            extra=BYTES,
            description="Size of each preallocated file. Small capacities use smaller files.",
        ),
    ] = GIB
    high_watermark: Annotated[
        float,
        Meta(gt=0, le=1, description="Fraction of the capacity at which eviction starts."),
    ] = 0.95
    low_watermark: Annotated[
        float,
        Meta(gt=0, le=1, description="Fraction of the capacity at which eviction stops."),
    ] = 0.90
    keep_free: Annotated[
        int,
        Meta(
            ge=0,
            extra=BYTES,
            description="Free space to leave on the file system. Below it, the tier stops growing "
            "and evicts its coldest pages to free space.",
        ),
    ] = 0
    queue_depth: Annotated[
        int,
        Meta(ge=1, le=64, description="Disk requests in flight per call."),
    ] = 16
    io_engine: Annotated[
        Literal["aio", "threads"],
        Meta(
            description="How to access the disk. `aio`: Linux AIO, or `threads` if the kernel or "
            "the file system does not support it. `threads`: a shared thread pool."
        ),
    ] = "aio"
    direct_io: Annotated[
        Literal["auto", "always", "never"],
        Meta(
            description="Whether to bypass the page cache (`O_DIRECT`). `auto`: if the file "
            "system supports it; otherwise log one warning and use buffered I/O."
        ),
    ] = "auto"

    def for_each_directory(self) -> "list[NvmeConfig]":
        """Return the settings of each directory: these, with that directory alone."""
        return [replace(self, directory=path) for path in split_paths(self.directory)]


class ShardConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of several servers or clusters that each hold a share of the pages.

    Empty settings are taken from `[minio]`: the three credential settings as a group, and the two
    client certificate settings as a group.
    """

    name: Annotated[
        str,
        Meta(
            description="Name of at most 32 characters of a-z, 0-9 and '-'. It decides which pages "
            "the shard gets, so keep it if the server moves.",
        ),
    ] = ""
    endpoint: Annotated[
        str, Meta(description="URL of the server, or comma-separated URLs of one cluster.")
    ] = ""
    bucket: Annotated[str, Meta(description="Bucket for pages.")] = ""
    prefix: Annotated[str, Meta(description="Prefix of every object key.")] = ""
    region: Annotated[str, Meta(description="Region used in request signatures.")] = ""
    access_key: Annotated[
        str,
        Meta(extra=SECRET, description="Access key; also `MEMKV_MINIO_SHARD_NAME_ACCESS_KEY`."),
    ] = ""
    secret_key: Annotated[
        str,
        Meta(extra=SECRET, description="Secret key; also `MEMKV_MINIO_SHARD_NAME_SECRET_KEY`."),
    ] = ""
    credentials_file: Annotated[
        str, Meta(extra=PATH, description="TOML file with the keys, instead of the two above.")
    ] = ""
    ca_file: Annotated[
        str, Meta(extra=PATH, description="PEM file with the CA certificates to trust.")
    ] = ""
    cert_file: Annotated[
        str, Meta(extra=PATH, description="PEM file with this node's client certificate.")
    ] = ""
    key_file: Annotated[
        str, Meta(extra=PATH, description="PEM file with the private key of `cert_file`.")
    ] = ""


class MinioConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tier shared by all nodes, in a bucket on MinIO or another S3 server."""

    endpoint: Annotated[
        str,
        Meta(
            description="Comma-separated URLs of the servers of one MinIO cluster, or of another "
            "S3 server, without a path, e.g. `http://minio:9000`. Empty: no MinIO tier, or "
            "`shards`."
        ),
    ] = ""
    shards: Annotated[
        tuple[ShardConfig, ...],
        Meta(
            extra=SHARDS,
            description="Several servers or clusters that each hold a share of the pages, instead "
            "of `endpoint`; see [shards](shards.md). In a file, write one table `[[minio.shards]]` "
            "for each. In a variable or flag, write the same as a TOML array.",
        ),
    ] = ()
    replicas: Annotated[
        int,
        Meta(
            ge=1,
            le=2,
            description="Number of shards that store each page. With 2, losing a shard loses no "
            "page, but pages take twice the space and uploads.",
        ),
    ] = 1
    bucket: Annotated[
        str,
        Meta(description="Bucket for pages; S3 naming rules apply."),
    ] = "memkv"
    prefix: Annotated[
        str,
        Meta(description="Prefix of every object key, so that several caches can share a bucket."),
    ] = ""
    role: Annotated[
        Literal["writer", "reader"],
        Meta(
            description="`reader`: this node loads pages from the bucket but never writes to it; "
            "its own pages stay on its disk."
        ),
    ] = "writer"
    region: Annotated[str, Meta(description="Region used in request signatures.")] = "us-east-1"
    addressing: Annotated[
        Literal["path", "virtual"],
        Meta(
            description="URL style: `path` is `http://host/bucket/key`, `virtual` is "
            "`http://bucket.host/key`."
        ),
    ] = "path"
    create_bucket: Annotated[
        bool,
        Meta(description="Create the bucket on first use if it does not exist."),
    ] = True
    require_tls: Annotated[bool, Meta(description="Reject endpoints that do not use https.")] = (
        False
    )
    ca_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="PEM file with the CA certificates to trust. A changed file takes effect "
            "within seconds. Empty: the system's.",
        ),
    ] = ""
    cert_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="PEM file with this node's client certificate, for servers that require "
            "one. Requires `key_file`. A changed file takes effect within seconds.",
        ),
    ] = ""
    key_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="PEM file with the private key of `cert_file`, without a password. Other "
            "users must not have access to it.",
        ),
    ] = ""
    certificate_login: Annotated[
        bool,
        Meta(
            description="Exchange `cert_file` for temporary access keys "
            "(`AssumeRoleWithCertificate`), so that this node stores no keys. MinIO must run with "
            "`MINIO_IDENTITY_TLS_ENABLE=on` and applies the policy named like the certificate's "
            "common name.",
        ),
    ] = False
    access_key: Annotated[
        str,
        Meta(
            extra=SECRET,
            description="Access key. If this, `secret_key` and `credentials_file` are empty, use "
            "minio-py's credential chain: `MINIO_*` and `AWS_*` variables, `~/.aws/credentials`, "
            "`~/.mc/config.json`, IAM.",
        ),
    ] = ""
    secret_key: Annotated[
        str,
        Meta(extra=SECRET, description="Secret key. Never a flag, never logged."),
    ] = ""
    credentials_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="TOML file with `access_key`, `secret_key` and optionally "
            "`session_token`, instead of the two settings above. Other users must not have access "
            "to it. Changes take effect within seconds.",
        ),
    ] = ""
    encryption_key_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="TOML file with the keys that encrypt pages before upload; see "
            "[security](security.md). Other users must not have access to it. Empty: no "
            "encryption, and everyone who can write to the bucket is trusted.",
        ),
    ] = ""
    sse: Annotated[
        Literal["none", "s3", "kms"],
        Meta(
            description="Server-side encryption to request: SSE-S3 or SSE-KMS. The server holds "
            "the keys."
        ),
    ] = "none"
    sse_kms_key: Annotated[str, Meta(description="Name of the server's key for `sse = kms`.")] = ""
    connections: Annotated[
        int,
        Meta(
            ge=1,
            le=256,
            description="Maximum number of connections per call, and so of its pages in flight; "
            "with shards, per shard.",
        ),
    ] = 8
    connect_timeout: Annotated[
        float,
        Meta(
            gt=0,
            le=5,
            extra=SECONDS,
            description="Time limit for opening a connection.",
        ),
    ] = 1.0
    stall_timeout: Annotated[
        float,
        Meta(
            gt=0,
            le=5,
            extra=SECONDS,
            description="How long a transfer may make no progress before it fails.",
        ),
    ] = 2.0
    idle_timeout: Annotated[
        float,
        Meta(
            gt=0,
            le=3600,
            extra=SECONDS,
            description="Close connections idle for longer than this. Set it below the idle "
            "timeout of any load balancer or firewall in front of the server.",
        ),
    ] = 60.0
    presence_cache_pages: Annotated[
        int,
        Meta(
            ge=0,
            description="Maximum number of pages remembered as present, which saves asking the "
            "server again.",
        ),
    ] = 1_000_000
    negative_ttl: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            extra=SECONDS,
            description="How long a missing page is remembered as missing. New pages of other "
            "nodes may stay invisible for this long.",
        ),
    ] = 1.0


class CollectorConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits for the bucket. The nodes enforce them together."""

    capacity: Annotated[
        int,
        Meta(
            ge=0,
            extra=BYTES,
            description="Maximum total size of the pages under the prefix; with shards, per shard. "
            "Above it, the least recently used pages are removed. 0: no limit.",
        ),
    ] = 0
    max_age: Annotated[
        float,
        Meta(
            ge=0,
            extra=SECONDS,
            description="Remove pages unused for longer than this. 0: no limit.",
        ),
    ] = 0.0
    interval: Annotated[
        float,
        Meta(
            ge=1,
            extra=SECONDS,
            description="Time from the end of one collection to the start of the next, on any "
            "node.",
        ),
    ] = 600.0
    use_period: Annotated[
        float,
        Meta(
            ge=1,
            extra=SECONDS,
            description="Precision of access times. Only the first use of a page in each period "
            "is logged.",
        ),
    ] = 3600.0
    run: Annotated[
        Literal["auto", "always", "never"],
        Meta(
            description="Whether this node collects. `auto`: if the server honours conditional "
            "writes, with which nodes agree on who collects what. `always`: even if it does not; "
            "then set it on one node only. `never`: this node only logs what it uses."
        ),
    ] = "auto"
    lease_ttl: Annotated[
        float,
        Meta(
            ge=5,
            le=3600,
            extra=SECONDS,
            description="How long a collecting node may be unresponsive before another node takes "
            "over.",
        ),
    ] = 60.0


class RecorderConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lookups recorded for `memkv plan --trace`, as salted page hashes."""

    file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="File to record lookups in, in an existing directory; older files get the "
            "suffixes `.1`, `.2` and so on. Empty: record nothing.",
        ),
    ] = ""
    max_size: Annotated[
        int,
        Meta(ge=MIB, extra=BYTES, description="Size at which a new file begins."),
    ] = 64 * MIB
    files: Annotated[
        int, Meta(ge=1, le=1000, description="Files to keep, including the current one.")
    ] = 4
    salt: Annotated[
        str,
        Meta(
            extra=SECRET,
            description="Secret of at least 16 characters that page hashes are salted with. Nodes "
            "with the same salt write comparable records. Empty: a random one for each start.",
        ),
    ] = ""


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings. Each section is a table of the TOML file."""

    agent: AgentConfig = AgentConfig()
    engine: EngineConfig = EngineConfig()
    nvme: NvmeConfig = NvmeConfig()
    minio: MinioConfig = MinioConfig()
    collector: CollectorConfig = CollectorConfig()
    recorder: RecorderConfig = RecorderConfig()
