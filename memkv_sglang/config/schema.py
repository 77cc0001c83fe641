"""Define every setting with its default, unit, range and description.

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
"""Shown in place of a secret."""


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
            description="Unix socket on which the agent serves this node's SGLang servers. If "
            "empty, `agent.sock` in `/run/memkv` if that directory belongs to this user, as the "
            "service's does; otherwise in `$XDG_RUNTIME_DIR/memkv`, or in `/tmp/memkv-UID` if that "
            "variable is not set.",
        ),
    ] = ""
    autostart: Annotated[
        bool,
        Meta(
            description="Whether a server starts an agent if none is running. Set it to false "
            "where the agent is a service or runs in another container. A server then needs no "
            "other settings.",
        ),
    ] = True
    http_port: Annotated[
        int,
        Meta(
            ge=0,
            le=65535,
            description="Port for `/livez`, `/readyz` and `/metrics`. With 0, the agent chooses a "
            "free port, which `memkv stats` shows.",
        ),
    ] = 0
    http_address: Annotated[
        str,
        Meta(
            description="IP address for `http_port`. With a loopback address, only this machine "
            "reaches the port; `0.0.0.0` and `::` listen on every interface.",
        ),
    ] = "127.0.0.1"
    http_cert_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="PEM file with the certificate for `http_port`, followed by its "
            "intermediates. Requires `http_key_file`. A changed file takes effect within seconds. "
            "If empty, the port uses plain http.",
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
            description="File with a token that requests for `/metrics` must send (`Authorization: "
            "Bearer ...`). `/livez` and `/readyz` need no token. Other users must not have access "
            "to the file. A changed file takes effect within seconds. If empty, `/metrics` needs "
            "no token either.",
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
            description="Format of the agent's log lines: `text` is logfmt, `json` is one JSON "
            "object per line. With `json`, an SGLang server also logs this project's events in "
            "that format, to its stderr; with `text`, it logs them in SGLang's format.",
        ),
    ] = "text"
    log_requests: Annotated[
        Literal["none", "slow", "all"],
        Meta(
            description="Which requests' lookups and loads are logged, for `memkv explain`. `slow` "
            "requests are those that wait for 100 ms or longer in total.",
        ),
    ] = "slow"
    drain_timeout: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            extra=SECONDS,
            description="How long the agent keeps uploading after SIGTERM. It uploads the "
            "remaining pages after its next start.",
        ),
    ] = 10.0
    idle_timeout: Annotated[
        float,
        Meta(
            ge=0,
            extra=SECONDS,
            description="How long an agent that a server started keeps running without clients. It "
            "also waits until its upload queue is empty. 0 means forever. An agent that was "
            "started by hand or as a service never exits for this reason.",
        ),
    ] = 60.0
    oom_score_adj: Annotated[
        int,
        Meta(
            ge=-1000,
            le=1000,
            description="How readily the kernel kills the agent when memory runs out, from -1000 "
            "(never) to 1000 (first). Lowering it needs CAP_SYS_RESOURCE. With 0, the agent keeps "
            "the value it inherited.",
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
            "that it has found. SGLang servers allow at least 1 s.",
        ),
    ] = 0.1
    batch_deadline: Annotated[
        float,
        Meta(
            gt=0,
            le=5.0,
            extra=SECONDS,
            description="Time limit of a load or spill call. Pages that are not loaded in time "
            "count as misses; pages that are not stored in time are not kept.",
        ),
    ] = 5.0
    skip_slow_loads: Annotated[
        bool,
        Meta(
            description="Whether to skip pages that would take longer to load than to recompute, "
            "at the tiers' current speed.",
        ),
    ] = True
    balance_loads: Annotated[
        bool,
        Meta(
            description="Load some of the pages that are on this node's disk from the shared tier "
            "instead, if that shortens a load by a quarter or more at the tiers' current speed. "
            "This suits nodes whose network is as fast as their disks. The servers send more data.",
        ),
    ] = False
    prefill_speed: Annotated[
        float,
        Meta(
            ge=0,
            description="Prefill speed of this node's servers in tokens per second, which decides "
            "whether a page loads faster than it can be recomputed. With 0, each server measures "
            "its own.",
        ),
    ] = 0.0
    upload: Annotated[
        Literal["always", "second_use", "before_eviction"],
        Meta(
            description="When to copy a page from this node's disk to the shared tier. `always`: "
            "right after it is spilled, so that any node can continue a conversation. "
            "`second_use`: when this node uses it again. `before_eviction`: when the pages that "
            "are only on this disk fill half of it, oldest first. `second_use` and "
            "`before_eviction` save uploads, cost hits on other nodes, and need `admission` = "
            "`always`.",
        ),
    ] = "always"
    namespace_salt: Annotated[
        str,
        Meta(
            max_length=256,
            description="Text that becomes part of every namespace. Servers share pages only if "
            "they have the same text. Change it to ignore all stored pages, for instance after a "
            "faulty release has computed wrong KV.",
        ),
    ] = ""
    upload_backlog: Annotated[
        int,
        Meta(
            gt=0,
            extra=BYTES,
            description="Maximum size of the pages waiting for upload. When it is reached, new "
            "pages are stored only on this node.",
        ),
    ] = 16 * GIB
    upload_attempts: Annotated[
        int,
        Meta(
            ge=1,
            le=1000,
            description="Number of failed attempts after which a page is dropped from the upload "
            "queue. Waiting for an open circuit breaker does not count.",
        ),
    ] = 5
    admission: Annotated[
        Literal["always", "second_use"],
        Meta(
            description="When to write a spilled page to this node's disk. `always`: at once. "
            "`second_use`: when the page is first loaded; until then, only the shared tier stores "
            "it. This saves disk writes, but a spill takes as long as the upload. `promote` then "
            "counts the spill as the first use."
        ),
    ] = "always"
    promote: Annotated[
        Literal["never", "second_use", "always"],
        Meta(
            description="When to copy a page that was loaded from the shared tier to this node's "
            "disk. `second_use`: when this node loads it for the second time."
        ),
    ] = "second_use"
    promote_buffer: Annotated[
        int,
        Meta(
            gt=0,
            extra=BYTES,
            description="Memory for pages that are being copied to this node's disk. While it is "
            "full, no further pages are copied.",
        ),
    ] = 128 * MIB
    breaker_failures: Annotated[
        int,
        Meta(
            ge=1,
            le=1000,
            description="Number of consecutive failures that open the circuit breaker.",
        ),
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
            "separated by commas, or as a list in a file. Each agent needs directories of its own. "
            "If empty, there is no NVMe tier.",
        ),
    ] = ""
    capacity: Annotated[
        int,
        Meta(
            ge=MIB,
            extra=BYTES,
            description="Disk space for pages and the tier's other files, per directory. It must "
            "not exceed the size of the file system.",
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
            description="Free space to leave on the file system. If less is free, the tier stops "
            "growing and evicts its coldest pages.",
        ),
    ] = 0
    queue_depth: Annotated[
        int,
        Meta(ge=1, le=64, description="Disk requests in flight per call."),
    ] = 16
    io_engine: Annotated[
        Literal["aio", "threads"],
        Meta(
            description="How to access the disk. `aio` uses Linux AIO, or `threads` if the kernel "
            "or the file system does not support it. `threads` uses a shared thread pool."
        ),
    ] = "aio"
    direct_io: Annotated[
        Literal["auto", "always", "never"],
        Meta(
            description="Whether to bypass the page cache (`O_DIRECT`). With `auto`, the agent "
            "does so if the file system supports it; otherwise it logs one warning and uses "
            "buffered I/O."
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
            "the shard gets, so keep the name if the server moves.",
        ),
    ] = ""
    endpoint: Annotated[
        str,
        Meta(
            description="URL of the server, or comma-separated URLs of the servers of one cluster."
        ),
    ] = ""
    bucket: Annotated[str, Meta(description="Bucket for pages.")] = ""
    prefix: Annotated[str, Meta(description="Prefix of every object key.")] = ""
    region: Annotated[str, Meta(description="Region used in request signatures.")] = ""
    access_key: Annotated[
        str,
        Meta(
            extra=SECRET,
            description="Access key. It can also be set in `MEMKV_MINIO_SHARD_NAME_ACCESS_KEY`.",
        ),
    ] = ""
    secret_key: Annotated[
        str,
        Meta(
            extra=SECRET,
            description="Secret key. It can also be set in `MEMKV_MINIO_SHARD_NAME_SECRET_KEY`.",
        ),
    ] = ""
    credentials_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="TOML file with the keys, in place of `access_key` and `secret_key`.",
        ),
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
            description="URL of the S3 server, without a path, e.g. `http://minio:9000`. For "
            "several servers of one cluster, separate their URLs by commas. If this and `shards` "
            "are empty, there is no MinIO tier."
        ),
    ] = ""
    shards: Annotated[
        tuple[ShardConfig, ...],
        Meta(
            extra=SHARDS,
            description="Several servers or clusters that each hold a share of the pages, in place "
            "of `endpoint`; see [shards](shards.md). In a file, write one table `[[minio.shards]]` "
            "for each. In a variable or flag, write a TOML array of tables.",
        ),
    ] = ()
    replicas: Annotated[
        int,
        Meta(
            ge=1,
            le=2,
            description="Number of shards that store each page. With 2, no page is lost if a shard "
            "is lost, but pages take twice the space and twice the uploads.",
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
            description="What this node may do in the bucket. A `reader` loads pages but never "
            "writes to the bucket; the pages that it spills stay on its disk."
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
        Meta(description="Whether to create the bucket on first use if it does not exist."),
    ] = True
    require_tls: Annotated[
        bool, Meta(description="Whether to reject endpoints that do not use https.")
    ] = False
    ca_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="PEM file with the CA certificates to trust. A changed file takes effect "
            "within seconds. If empty, the system's CA certificates are trusted.",
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
            description="Whether to use this node's certificate (`cert_file`) to get temporary "
            "access keys from MinIO (`AssumeRoleWithCertificate`), so that the node stores no "
            "keys. MinIO must run with `MINIO_IDENTITY_TLS_ENABLE=on` and have a policy whose name "
            "is the certificate's common name; that policy applies.",
        ),
    ] = False
    access_key: Annotated[
        str,
        Meta(
            extra=SECRET,
            description="Access key. If `access_key`, `secret_key` and `credentials_file` are all "
            "empty, minio-py's credential chain provides the keys: `MINIO_*` and `AWS_*` "
            "variables, `~/.aws/credentials`, `~/.mc/config.json`, IAM.",
        ),
    ] = ""
    secret_key: Annotated[
        str,
        Meta(extra=SECRET, description="Secret key. It has no flag and is never logged."),
    ] = ""
    credentials_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="TOML file with `access_key`, `secret_key` and optionally `session_token`, "
            "in place of those settings. Other users must not have access to it. A changed file "
            "takes effect within seconds.",
        ),
    ] = ""
    encryption_key_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="TOML file with the keys that encrypt pages before upload; see "
            "[security](security.md). Other users must not have access to it. If empty, pages are "
            "not encrypted, and everyone who can write to the bucket is trusted.",
        ),
    ] = ""
    sse: Annotated[
        Literal["none", "s3", "kms"],
        Meta(
            description="Server-side encryption to request, with keys that the server holds: "
            "SSE-S3, SSE-KMS, or none."
        ),
    ] = "none"
    sse_kms_key: Annotated[str, Meta(description="Name of the server's key if `sse` is `kms`.")] = (
        ""
    )
    connections: Annotated[
        int,
        Meta(
            ge=1,
            le=256,
            description="Maximum number of connections that serve one call, and so of its pages in "
            "flight. With shards, the limit applies to each shard.",
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
            description="How long a connection may be idle before the agent closes it. Set it "
            "below the idle timeout of any load balancer or firewall in front of the server.",
        ),
    ] = 60.0
    presence_cache_pages: Annotated[
        int,
        Meta(
            ge=0,
            description="Maximum number of pages that the agent remembers as present, to save "
            "requests.",
        ),
    ] = 1_000_000
    negative_ttl: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            extra=SECONDS,
            description="How long the agent remembers a page as missing. It may overlook another "
            "node's new pages for this long.",
        ),
    ] = 1.0


class CollectorConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits for the bucket. The nodes enforce them together."""

    capacity: Annotated[
        int,
        Meta(
            ge=0,
            extra=BYTES,
            description="Maximum total size of the pages under the prefix. Above it, the least "
            "recently used pages are removed. With shards, the limit applies to each shard. 0 "
            "means no limit.",
        ),
    ] = 0
    max_age: Annotated[
        float,
        Meta(
            ge=0,
            extra=SECONDS,
            description="Remove pages that no node has used for this long. 0 means no limit.",
        ),
    ] = 0.0
    interval: Annotated[
        float,
        Meta(
            ge=1,
            le=86400,
            extra=SECONDS,
            description="Time from the end of one collection to the start of the next, which any "
            "node may make.",
        ),
    ] = 600.0
    use_period: Annotated[
        float,
        Meta(
            ge=1,
            extra=SECONDS,
            description="Precision of access times: a node logs only its first use of a page in "
            "each period of this length.",
        ),
    ] = 3600.0
    run: Annotated[
        Literal["auto", "always", "never"],
        Meta(
            description="Whether this node collects. `auto`: if the server supports conditional "
            "writes, with which the nodes agree on who collects what. `always`: even if the server "
            "does not; then set it on one node only. `never`: this node only logs the pages that "
            "it uses."
        ),
    ] = "auto"
    lease_ttl: Annotated[
        float,
        Meta(
            ge=5,
            le=3600,
            extra=SECONDS,
            description="How long a collecting node may be unresponsive before another node takes "
            "over its work.",
        ),
    ] = 60.0


class RecorderConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lookups recorded for `memkv plan --trace`, as salted page hashes."""

    file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="File to record lookups in. Its directory must exist. Older files get the "
            "suffixes `.1`, `.2` and so on. If empty, nothing is recorded.",
        ),
    ] = ""
    max_size: Annotated[
        int,
        Meta(ge=MIB, extra=BYTES, description="Size at which the recorder begins a new file."),
    ] = 64 * MIB
    files: Annotated[
        int, Meta(ge=1, le=1000, description="Number of files to keep, including the current one.")
    ] = 4
    salt: Annotated[
        str,
        Meta(
            extra=SECRET,
            description="Secret of at least 16 characters with which page hashes are salted. Nodes "
            "with the same salt write comparable records. If empty, each start uses a random salt.",
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
