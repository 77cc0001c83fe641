"""Every setting of the project with its default, unit, range and meaning: the one place for all.

Sizes are bytes and times are seconds; files, variables and flags may write `100GiB` or `250ms`.
"""

from typing import Annotated, Any, Literal, get_origin

from msgspec import Meta, Struct
from msgspec.structs import FieldInfo, fields

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

BYTES = {"unit": "bytes"}
SECONDS = {"unit": "seconds"}
PATH = {"unit": "path"}
SECRET = {"secret": True}

REDACTED = "(secret)"
"""Shown in place of a secret that is set."""


def field_meta(field: FieldInfo) -> Meta:
    """Return what a field's annotation says beside its type: range, unit, meaning."""
    if get_origin(field.type) is not Annotated:
        return Meta()
    meta: Meta = field.type.__metadata__[0]
    return meta


class Section(Struct, frozen=True):
    """A group of settings. Its `repr` shows no secret, so that no log or traceback does."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(field.name, self._shown(field)) for field in fields(self)]

    def __repr__(self) -> str:
        items = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({items})"

    def _shown(self, field: FieldInfo) -> Any:
        value = getattr(self, field.name)
        return REDACTED if value and field_meta(field).extra == SECRET else value


class AgentConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The node agent as a process."""

    socket: Annotated[
        str,
        Meta(
            extra=PATH,
            description="Unix socket that servers of this node connect to. Empty: `agent.sock` in "
            "`$XDG_RUNTIME_DIR/memkv`, or in `/tmp/memkv-UID` where that is not set.",
        ),
    ] = ""
    http_port: Annotated[
        int,
        Meta(
            ge=0,
            le=65535,
            description="Loopback port for `/healthz`, `/readyz` and `/metrics`. 0: a free one, "
            "which `memkv stats` tells.",
        ),
    ] = 0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="Least severe events that are logged; pages only appear at `debug`."),
    ] = "info"
    drain_timeout: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            extra=SECONDS,
            description="How long SIGTERM waits for the upload queue. What is left then goes on at "
            "the next start.",
        ),
    ] = 10.0
    idle_timeout: Annotated[
        float,
        Meta(
            ge=0,
            extra=SECONDS,
            description="Exit after so long without a client and with an empty upload queue. 0: "
            "never.",
        ),
    ] = 0.0


class EngineConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lookups, loads, spills and the upload queue."""

    lookup_budget: Annotated[
        float,
        Meta(
            gt=0,
            le=4.0,
            extra=SECONDS,
            description="Longest time of a lookup; then the prefix known by then is the answer.",
        ),
    ] = 0.1
    batch_deadline: Annotated[
        float,
        Meta(
            gt=0,
            le=5.0,
            extra=SECONDS,
            description="Longest time of a load or spill call; what is not done by then is a miss.",
        ),
    ] = 5.0
    skip_slow_loads: Annotated[
        bool,
        Meta(
            description="Whether a lookup leaves out what would take longer to load, at the tiers' "
            "present speed, than to compute.",
        ),
    ] = True
    prefill_speed: Annotated[
        float,
        Meta(
            ge=0,
            description="Tokens a second that a server of this node computes, to compare loads "
            "with. 0: what it is seen to compute.",
        ),
    ] = 0.0
    upload_backlog: Annotated[
        int,
        Meta(
            gt=0,
            extra=BYTES,
            description="Pages that may wait for upload. Beyond it new pages stay on this node.",
        ),
    ] = 16 * GIB
    upload_attempts: Annotated[
        int,
        Meta(
            ge=1,
            le=1000,
            description="Tries for one page to reach the shared tier before it is dropped from "
            "the queue; an open circuit does not count as one.",
        ),
    ] = 5
    admission: Annotated[
        Literal["always", "second_use"],
        Meta(
            description="When a spilled page is written to this node's disk. `second_use`: not "
            "before it is loaded again; until then it is in the shared tier alone, which writes "
            "the disk less and acknowledges spills later. `promote` then counts the spill as the "
            "first use."
        ),
    ] = "always"
    promote: Annotated[
        Literal["never", "second_use", "always"],
        Meta(
            description="When a page loaded from the shared tier is copied to this node's disk. "
            "`second_use`: the second time that this node loads it."
        ),
    ] = "second_use"
    promote_buffer: Annotated[
        int,
        Meta(
            gt=0,
            extra=BYTES,
            description="Memory for copies on their way to this node's disk; a page that finds "
            "no room is not promoted.",
        ),
    ] = 128 * MIB
    breaker_failures: Annotated[
        int,
        Meta(ge=1, le=1000, description="Failures in a row that open the circuit."),
    ] = 5
    breaker_cooldown: Annotated[
        float,
        Meta(
            gt=0,
            le=600,
            extra=SECONDS,
            description="How long an open circuit waits before it lets one call through.",
        ),
    ] = 2.0


class NvmeConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tier on this node's disk."""

    directory: Annotated[
        str,
        Meta(
            extra=PATH,
            description="Directory of the pages, of one agent alone. Empty: no NVMe tier.",
        ),
    ] = ""
    capacity: Annotated[
        int,
        Meta(
            ge=MIB,
            extra=BYTES,
            description="Space on the disk for pages and all other files of the tier. At most the "
            "file system's size.",
        ),
    ] = 100 * GIB
    segment_size: Annotated[
        int,
        Meta(
            ge=MIB,
            le=64 * GIB,
            extra=BYTES,
            description="Size of a preallocated file; smaller where the capacity is small.",
        ),
    ] = GIB
    high_watermark: Annotated[
        float,
        Meta(gt=0, le=1, description="Share of the capacity in use at which eviction begins."),
    ] = 0.95
    low_watermark: Annotated[
        float,
        Meta(gt=0, le=1, description="Share of the capacity in use at which eviction ends."),
    ] = 0.90
    keep_free: Annotated[
        int,
        Meta(
            ge=0,
            extra=BYTES,
            description="Space of the file system to leave to others: with less than that free the "
            "tier grows no more, and gives back what it holds of it, coldest pages first.",
        ),
    ] = 0
    queue_depth: Annotated[
        int,
        Meta(ge=1, le=64, description="Disk requests that a call keeps in flight."),
    ] = 16
    io_engine: Annotated[
        Literal["aio", "threads"],
        Meta(
            description="What asks the disk: Linux AIO, where there is O_DIRECT and the kernel has "
            "it; otherwise, and with `threads`, threads that all calls share."
        ),
    ] = "aio"
    direct_io: Annotated[
        Literal["auto", "always", "never"],
        Meta(
            description="O_DIRECT. `auto`: ordinary I/O where the file system has none, with one "
            "warning."
        ),
    ] = "auto"


class MinioConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tier that all nodes share."""

    endpoint: Annotated[
        str,
        Meta(
            description="URLs of one cluster's servers, comma-separated, e.g. "
            "`http://minio:9000`; no path. Empty: no MinIO tier."
        ),
    ] = ""
    bucket: Annotated[
        str,
        Meta(description="Bucket of the pages (S3 bucket naming rules)."),
    ] = "memkv"
    prefix: Annotated[
        str,
        Meta(description="Put before every object's key, for several caches in one bucket."),
    ] = ""
    role: Annotated[
        Literal["writer", "reader"],
        Meta(
            description="`reader`: this node loads pages of the bucket and never writes to it; its "
            "own pages stay on its disk."
        ),
    ] = "writer"
    region: Annotated[str, Meta(description="Region that requests are signed for.")] = "us-east-1"
    addressing: Annotated[
        Literal["path", "virtual"],
        Meta(description="`http://host/bucket/key` or `http://bucket.host/key`."),
    ] = "path"
    create_bucket: Annotated[
        bool,
        Meta(description="Make the bucket at first use if it is not there."),
    ] = True
    require_tls: Annotated[bool, Meta(description="Refuse endpoints that are not https.")] = False
    ca_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="PEM file with the authorities to trust. Empty: the system's.",
        ),
    ] = ""
    cert_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="PEM file with this node's certificate, for a server that asks for one; "
            "goes with `key_file`.",
        ),
    ] = ""
    key_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="PEM file with the private key of `cert_file`, private and without a "
            "password.",
        ),
    ] = ""
    certificate_login: Annotated[
        bool,
        Meta(
            description="Get access keys from MinIO for `cert_file` (`AssumeRoleWithCertificate`, "
            "which its `MINIO_IDENTITY_TLS_ENABLE=on` allows), so that the node keeps none. The "
            "certificate's common name is the name of the policy it gets.",
        ),
    ] = False
    access_key: Annotated[
        str,
        Meta(
            extra=SECRET,
            description="Access key; with `secret_key` and `credentials_file` empty too, "
            "minio-py's credential chain: "
            "`MINIO_*` and `AWS_*` variables, `~/.aws/credentials`, `~/.mc/config.json`, IAM.",
        ),
    ] = ""
    secret_key: Annotated[
        str,
        Meta(extra=SECRET, description="Secret key; never a flag, never logged."),
    ] = ""
    credentials_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="Private TOML file with `access_key`, `secret_key` and perhaps "
            "`session_token`, instead of the two above. A new content is used within seconds.",
        ),
    ] = ""
    encryption_key_file: Annotated[
        str,
        Meta(
            extra=PATH,
            description="Private TOML file with the keys that pages are encrypted with on "
            "their way to MinIO, see [security](security.md). Empty: they are not, and whoever can "
            "write the bucket is trusted.",
        ),
    ] = ""
    sse: Annotated[
        Literal["none", "s3", "kms"],
        Meta(
            description="Encryption that the server is asked for (SSE-S3, SSE-KMS); it holds the "
            "keys then."
        ),
    ] = "none"
    sse_kms_key: Annotated[str, Meta(description="Name of the server's key for `sse = kms`.")] = ""
    connections: Annotated[
        int,
        Meta(ge=1, le=256, description="Pages in flight, one connection each."),
    ] = 8
    connect_timeout: Annotated[
        float,
        Meta(
            gt=0,
            le=5,
            extra=SECONDS,
            description="Longest time to open a connection.",
        ),
    ] = 1.0
    stall_timeout: Annotated[
        float,
        Meta(
            gt=0,
            le=5,
            extra=SECONDS,
            description="Longest time for a server to send or take nothing.",
        ),
    ] = 2.0
    idle_timeout: Annotated[
        float,
        Meta(
            gt=0,
            le=3600,
            extra=SECONDS,
            description="Connections that were idle for so long are closed instead of used again. "
            "Set it below the idle timeout of any load balancer or firewall in front of MinIO.",
        ),
    ] = 60.0
    presence_cache_pages: Annotated[
        int,
        Meta(ge=0, description="Pages remembered as present, so that no one asks for them."),
    ] = 1_000_000
    negative_ttl: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            extra=SECONDS,
            description="How long a page found missing is taken as missing. Another node's new "
            "pages may stay unseen for so long.",
        ),
    ] = 1.0


class CollectorConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may stay in the bucket; one node at a time sees to it."""

    capacity: Annotated[
        int,
        Meta(
            ge=0,
            extra=BYTES,
            description="Pages in the bucket, under the prefix. Beyond it those that were not used "
            "for longest are removed. 0: no limit.",
        ),
    ] = 0
    max_age: Annotated[
        float,
        Meta(
            ge=0,
            extra=SECONDS,
            description="Pages that were not used for so long are removed. 0: no limit.",
        ),
    ] = 0.0
    interval: Annotated[
        float,
        Meta(
            ge=1,
            extra=SECONDS,
            description="From the end of one collection to the next one, whichever node does it.",
        ),
    ] = 600.0
    use_period: Annotated[
        float,
        Meta(
            ge=1,
            extra=SECONDS,
            description="How exactly the last use of a page is known: the first use in each period "
            "of this length is noted in the bucket, at the price of two small requests.",
        ),
    ] = 3600.0
    lease_ttl: Annotated[
        float,
        Meta(
            ge=5,
            le=3600,
            extra=SECONDS,
            description="How long a node that collects may be silent before another takes over.",
        ),
    ] = 60.0


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings. Sections are the tables of the TOML file."""

    agent: AgentConfig = AgentConfig()
    engine: EngineConfig = EngineConfig()
    nvme: NvmeConfig = NvmeConfig()
    minio: MinioConfig = MinioConfig()
    collector: CollectorConfig = CollectorConfig()
