"""Bad input: one line that names the setting, exit status 2, and nothing created."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NOBODY = 65534

PROGRAM = """
import os, sys
import memkv_sglang.cli.main as cli
if {uid}:
    os.setgroups([])
    os.setgid({uid})
    os.setuid({uid})
sys.exit(cli.main())
"""


@dataclass(frozen=True)
class Bad:
    """Bad flags, variables or file; `{tmp}` in them stands for the test's directory."""

    name: str
    says: tuple[str, ...]
    """Texts that the line must contain: the setting as the user wrote it, and how to correct it."""
    flags: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    file: str | None = None
    mode: int = 0o600
    uid: int = 0
    """User to run as; needs root."""


def flag(name: str, value: str, *says: str) -> Bad:
    return Bad(f"{name}={value}"[:60], (f"{name}:", *says), (name, value))


def variable(name: str, value: str, *says: str) -> Bad:
    return Bad(f"{name}={value}"[:60], (f"{name}:", *says), environ={name: value})


def file(text: str, key: str, *says: str, mode: int = 0o600) -> Bad:
    says = (f"error: {key} in {{tmp}}/memkv.toml:", *says)
    return Bad(text.replace("\n", " "), says, file=text, mode=mode)


ENDPOINT = "--minio-endpoint"
BUCKET = "--minio-bucket"
CERTIFICATE = ("--minio-cert-file", "{tmp}/c.pem", "--minio-key-file", "{tmp}/k.pem")
KEYS = {"MEMKV_MINIO_ACCESS_KEY": "hunter2", "MEMKV_MINIO_SECRET_KEY": "hunter2"}

SHARD = "[[minio.shards]]\nname = '{}'\nendpoint = 'http://{}:9000'\n"
TWO = SHARD.format("a", "one") + SHARD.format("b", "two")


CASES = [
    # Shards
    file(TWO + "bucke = 'b'", "minio.shards", "shard b, bucke", "bucket"),
    file(TWO + "bucket = 'B'", "minio.shards", "shard b, bucket", "a-z"),
    file(TWO + "region = 'X'", "minio.shards", "shard b, region", "us-east-1"),
    file(TWO + "key_file = 'k'", "minio.shards", "shard b, key_file", "cert_file"),
    file(TWO + "prefix = 3", "minio.shards", "shard b, prefix", "text in quotes"),
    file("[minio]\nbucket = 'B'\n" + TWO, "minio.bucket", "a-z"),
    file(TWO + SHARD.format("a", "three"), "minio.shards", "two shards are named a", "rename"),
    file(SHARD.format("a", "one") + SHARD.format("b", "one"), "minio.shards", "a and b", "remove"),
    file(SHARD.format("A b", "one"), "minio.shards", "shard 1 needs a name", "a-z"),
    file("[[minio.shards]]\nname = 'a'", "minio.shards", "shard a", "endpoint"),
    file(SHARD.format("a", "one/x"), "minio.shards", "shard a, endpoint", "path"),
    file("[minio]\nendpoint = 'http://h:1'\n" + TWO, "minio.endpoint", "minio.shards", "remove"),
    file("[minio]\nreplicas = 2\n" + SHARD.format("a", "o"), "minio.replicas", "shards"),
    file("[minio]\nreplicas = 2", "minio.replicas", "[[minio.shards]]"),
    file("[minio]\nshards = 'a'", "minio.shards", "array of tables", "name ="),
    file("[minio]\nshards = 1", "minio.shards", "array of tables", "name ="),
    file(TWO + "secret_key = 'hunter2'", "minio.shards", "chmod 600", mode=0o644),
    file(
        TWO + "secret_key = 'hunter2'", "minio.shards", "shard b", "MEMKV_MINIO_SHARD_B_ACCESS_KEY"
    ),
    flag("--minio-shards", "[{{name = 'a', secret_key = 'hunter2'}}]", "MEMKV_MINIO_SHARDS"),
    flag("--minio-shards", "a=http://one:9000", "TOML array", "name ="),
    variable("MEMKV_MINIO_SHARDS", "[{{secret_key = 'hunter2']", "TOML array"),
    variable("MEMKV_MINIO_SHARD_C_SECRET_KEY", "hunter2", "no such shard", "unset"),
    # Unknown names
    file("[nvme]\ncapcity = 1", "nvme.capcity", "nvme.capacity"),
    file("[nvme]\nbucket = 'b'", "nvme.bucket", "minio.bucket"),
    file("[nvmee]\ncapacity = 1", "nvmee", "nvme"),
    file("capacity = 1", "capacity", "[nvme]"),
    file("nvme = 1", "nvme", "[nvme]"),
    variable("MEMKV_NVME_CAPCITY", "1GiB", "MEMKV_NVME_CAPACITY"),
    variable("MEMKV_NVM_CAPACITY", "1GiB", "MEMKV_NVME_CAPACITY"),
    Bad("unknown flag", ("--nvme-capcity", "--nvme-capacity"), ("--nvme-capcity", "1GiB")),
    # Wrong units, types and ranges
    flag("--nvme-capacity", "100 parsecs", "GiB"),
    flag("--nvme-capacity", "100G", "GiB"),
    flag("--nvme-capacity", "2s", "GiB"),
    flag("--engine-lookup-budget", "5GiB", "ms"),
    flag("--engine-lookup-budget", "1h", "4s"),
    flag("--nvme-capacity", "0", "at least 1MiB"),
    variable("MEMKV_NVME_CAPACITY", "0GiB", "at least 1MiB"),
    file("[nvme]\ncapacity = 0", "nvme.capacity", "at least 1MiB"),
    flag("--nvme-capacity", "10", "at least 1MiB"),
    flag("--agent-http-port", "99999", "out of range", "0 to 65535"),
    flag("--agent-http-port", "ninety", "a whole number"),
    flag("--nvme-high-watermark", "1.5", "out of range"),
    file("[nvme]\nqueue_depth = true", "nvme.queue_depth", "1 to 64"),
    file("[nvme]\nqueue_depth = 65", "nvme.queue_depth", "1 to 64"),
    file("[nvme]\nhigh_watermark = nan", "nvme.high_watermark", "at most 1"),
    file("[agent]\nidle_timeout = inf", "agent.idle_timeout", "at least 0s"),
    file("[minio]\nrequire_tls = 'yes'", "minio.require_tls", "true, false"),
    file("[minio]\nbucket = 5", "minio.bucket", "quotes"),
    flag("--agent-log-level", "warn", "warning"),
    flag("--nvme-low-watermark", "0.99", "nvme.high_watermark"),
    # The file itself
    Bad("no TOML", ("{tmp}/memkv.toml:", "TOML"), file="[nvme\n"),
    Bad("no text", ("{tmp}/memkv.toml:", "UTF-8"), file="\udcff"),
    Bad(
        "no file",
        ("configuration file: cannot read {tmp}/none.toml", "name another"),
        ("--config", "{tmp}/none.toml"),
    ),
    Bad(
        "a directory",
        ("configuration file: {tmp} is not a regular file", "name another"),
        environ={"MEMKV_CONFIG": "{tmp}"},
    ),
    # The directory
    flag("--nvme-directory", "{tmp}/file", "not a directory"),
    flag("--nvme-directory", "{tmp}/file/below", "not a directory"),
    flag("--nvme-directory", "/proc/memkv", "no space for files"),
    flag("--nvme-directory", "{tmp}/foreign", "belongs to uid"),
    flag("--nvme-directory", "{tmp}/a\nb", "unprintable"),
    Bad(
        "capacity above the disk",
        ("--nvme-capacity:", "file system"),
        ("--nvme-capacity", "1000PiB", "--nvme-directory", "{tmp}/cache"),
    ),
    Bad("no tier", ("nvme.directory", "minio.endpoint", "--nvme-directory")),
    # MinIO
    flag(ENDPOINT, "http://minio:9000/bucket", "remove '/bucket'"),
    flag(ENDPOINT, "http://minio:9000/", "remove '/'"),
    flag(ENDPOINT, "http://minio:9000?a=b", "remove '?a=b'"),
    flag(ENDPOINT, "minio:9000", "http://minio:9000"),
    flag(ENDPOINT, "ftp://minio:9000", "http"),
    flag(ENDPOINT, "http://", "not a URL"),
    flag(ENDPOINT, "http://minio:99999", "not a URL"),
    flag(ENDPOINT, "http://minio:9000,", "not a URL"),
    flag(ENDPOINT, "http://me:hunter2@minio:9000", "MEMKV_MINIO_SECRET_KEY"),
    Bad(
        "http where TLS is demanded",
        (f"{ENDPOINT}:", "--minio-require-tls", "https"),
        (ENDPOINT, "http://minio:9000", "--minio-require-tls"),
    ),
    Bad(
        "a name before an address",
        ("--minio-addressing:", "host name"),
        (ENDPOINT, "http://127.0.0.1:9000", "--minio-addressing", "virtual"),
    ),
    *(
        flag(BUCKET, name, "choose another")
        for name in ("ab", "Memkv", "mem_kv", "-memkv", "mem..kv", "mem.-kv", "192.168.0.1")
    ),
    flag(BUCKET, "minio", "reserved by MinIO"),
    flag(BUCKET, "x" * 64, "63"),
    *(flag("--minio-prefix", prefix, "prefix") for prefix in ("/a", "a/", "a//b", "../a", "a b")),
    flag("--minio-region", "", "us-east-1"),
    *(
        Bad(name, ("--minio-ca-file:", "PEM"), (ENDPOINT, "https://m", "--minio-ca-file", name))
        for name in ("{tmp}/none.pem", "{tmp}/file")
    ),
    *(
        Bad(
            f"certificate login {' '.join(flags)}",
            ("--minio-certificate-login:", *says),
            ("--minio-certificate-login", *flags),
            environ,
        )
        for flags, environ, says in (
            ((ENDPOINT, "https://m"), {}, ("minio.cert_file",)),
            ((ENDPOINT, "http://m", *CERTIFICATE), {}, ("https",)),
            ((ENDPOINT, "https://m", *CERTIFICATE), KEYS, ("minio.access_key", "remove")),
        )
    ),
    # Credentials
    variable("MEMKV_MINIO_ACCESS_KEY", "", "empty"),
    variable("MEMKV_MINIO_SECRET_KEY", "", "empty"),
    variable("MEMKV_MINIO_ACCESS_KEY", "hunter2", "minio.secret_key"),
    variable("MEMKV_MINIO_SECRET_KEY", "hunter2", "minio.access_key"),
    variable("MEMKV_MINIO_SECRET_KEY", "hunter2\n", "line break"),
    flag("--minio-secret-key", "hunter2", "MEMKV_MINIO_SECRET_KEY"),
    flag("--minio-access-key", "hunter2", "MEMKV_MINIO_ACCESS_KEY"),
    file("[minio]\nsecret_key = 'hunter2'", "minio.secret_key", "chmod 600", mode=0o644),
    file("[minio]\nsecret_key = ['hunter2']", "minio.secret_key", "quotes"),
    # The socket and the port
    flag("--agent-socket", "/" + "x" * 107, "107"),
    Bad(
        "a socket path that is a file",
        ("agent.socket: {tmp}/private/file", "set another path"),
        ("--agent-socket", "{tmp}/private/file", "--nvme-directory", "{tmp}/cache"),
    ),
]

if os.geteuid() == 0:
    CASES.append(
        Bad(
            "directory not writable",
            ("--nvme-directory:", "not writable", f"install -d -o {NOBODY} -m 0700"),
            ("--nvme-directory", "{tmp}/cache"),
            uid=NOBODY,
        )
    )


@pytest.fixture
def tmp() -> Iterator[Path]:
    """A directory with a short name that other users can read."""
    with tempfile.TemporaryDirectory(prefix="memkv-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "file").write_text("no certificate\n")
        (directory / "private").mkdir(mode=0o700)
        (directory / "private" / "file").write_text("no socket\n")
        if os.geteuid() == 0:
            (directory / "foreign").mkdir()
            os.chown(directory / "foreign", NOBODY, NOBODY)
        else:
            (directory / "foreign").symlink_to("/usr")
        yield directory


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Return the mode and modification time of everything in a directory."""
    everything = [directory, *directory.rglob("*")]
    return {str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns) for path in everything}


def run_agent(
    tmp: Path, flags: tuple[str, ...], environ: Mapping[str, str], uid: int = 0
) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(uid=uid)
    return subprocess.run(
        [sys.executable, "-c", program, "agent", *(item.format(tmp=tmp) for item in flags)],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp),
            "XDG_RUNTIME_DIR": str(tmp),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MEMKV_CONFIG": "",
            **{name: value.format(tmp=tmp) for name, value in environ.items()},
        },
        cwd=tmp,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_bad_input(bad: Bad, tmp: Path) -> None:
    environ = dict(bad.environ)
    if bad.file is not None:
        path = tmp / "memkv.toml"
        path.write_text(bad.file, errors="surrogateescape")
        path.chmod(bad.mode)
        environ["MEMKV_CONFIG"] = str(path)
    before = snapshot(tmp)
    result = run_agent(tmp, bad.flags, environ, bad.uid)
    lines = result.stderr.splitlines()
    assert (result.returncode, result.stdout, len(lines)) == (2, "", 1), result.stderr
    assert lines[0].startswith("error: ")
    assert [says for says in bad.says if says.format(tmp=tmp) not in lines[0]] == [], lines[0]
    assert "hunter2" not in lines[0]
    assert snapshot(tmp) == before
