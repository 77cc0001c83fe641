"""Secret files may be readable by this process's user and groups, and by no other user."""

import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from memkv_testbed.certificates import Authority

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import load_config
from memkv_sglang.config.private import SIZE_LIMIT, read_private
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.encryption.keys import load_key_ring
from memkv_sglang.tiers.minio.auth.credentials_file import read_credentials
from memkv_sglang.tiers.minio.http.tls import tls_context

USER, GROUP, FS_GROUP, STRANGER = 31234, 31235, 31236, 31237

GOOD = 'access_key = "a key"\nsecret_key = "a secret"\n'

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become other users")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that other users can enter, unlike pytest's own."""
    directory = Path(tempfile.mkdtemp(prefix="memkv-secrets-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def write(path: Path, content: str | bytes = GOOD, mode: int = 0o600) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def as_user(action: Callable[[], object]) -> str:
    """Run an action in a process of `USER`; return its error, or an empty string."""
    read, written = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([FS_GROUP])
            os.setresgid(GROUP, GROUP, GROUP)
            os.setresuid(USER, USER, USER)
            action()
        except ConfigError as error:
            os.write(written, str(error).encode())
        except BaseException as error:
            os.write(written, f"unexpected {error!r}".encode())
        finally:
            os._exit(0)
    os.close(written)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(child, 0)
    return answer


@needs_root
@pytest.mark.parametrize(
    ("owner", "group", "mode", "problem"),
    [
        (0, FS_GROUP, 0o440, ""),  # a Kubernetes secret with fsGroup
        (0, FS_GROUP, 0o640, ""),
        (0, GROUP, 0o440, ""),
        (USER, FS_GROUP, 0o440, ""),
        (USER, GROUP, 0o640, ""),
        (USER, STRANGER, 0o600, ""),
        (USER, GROUP, 0o400, ""),
        (0, FS_GROUP, 0o444, "chmod 600"),  # the default mode of Kubernetes secrets
        (0, 0, 0o444, "defaultMode: 0440"),
        (USER, STRANGER, 0o440, "other users can read"),
        (USER, GROUP, 0o460, "other users can read or write"),
        (0, FS_GROUP, 0o660, "other users can read or write"),
        (USER, GROUP, 0o602, "other users can read or write"),
        (STRANGER, FS_GROUP, 0o440, f"belongs to uid {STRANGER}"),
        (0, STRANGER, 0o440, "cannot read"),
    ],
)
def test_permissions_of_secret_files(
    place: Path, owner: int, group: int, mode: int, problem: str
) -> None:
    path = write(place / "memkv.toml", f"[minio]\n{GOOD}")
    keys = write(place / "keys.toml", f'write = "a"\n[keys]\na = "{"0" * 64}"')
    credentials = write(place / "credentials.toml")
    for file in (path, keys, credentials):
        os.chown(file, owner, group)
        file.chmod(mode)
    answers = {
        "minio.credentials_file": as_user(lambda: read_credentials(str(credentials))),
        "minio.encryption_key_file": as_user(lambda: load_key_ring(str(keys))),
    }
    for setting, answer in answers.items():
        assert problem in answer
        assert bool(answer) == bool(problem)
        assert not answer or answer.startswith(f"{setting}: ")
        assert "\n" not in answer
    if owner != STRANGER:  # a configuration may belong to whoever manages the machine
        in_configuration = as_user(lambda: load_config(path, {}, {}))
        assert bool(in_configuration) == bool(problem)


@needs_root
def test_a_secret_through_the_links_of_a_kubernetes_volume(place: Path) -> None:
    for version, key in (("..2026_01", "old"), ("..2026_02", "new")):
        (place / version).mkdir(mode=0o755)
        secret = write(place / version / "credentials", GOOD.replace("a key", key), 0o440)
        os.chown(secret, 0, FS_GROUP)
    (place / "..data").symlink_to("..2026_01")
    (place / "credentials").symlink_to("..data/credentials")

    def show_key() -> None:
        raise ConfigError(read_credentials(str(place / "credentials")).access_key)

    assert as_user(show_key) == "old"
    (place / "..data_tmp").symlink_to("..2026_02")
    (place / "..data_tmp").rename(place / "..data")
    assert as_user(show_key) == "new"
    (place / "..data").unlink()
    assert "cannot read" in as_user(show_key)


def test_the_opened_file_is_checked_and_not_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "credentials", mode=0o644)
    other = write(tmp_path / "other")
    real_open = os.open

    def swap_after_open(name: str, flags: int) -> int:
        descriptor = real_open(name, flags)
        other.rename(path)
        return descriptor

    monkeypatch.setattr(os, "open", swap_after_open)
    with pytest.raises(ConfigError, match="other users can read"):
        read_private(str(path), "setting")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content",
    [
        GOOD.replace("\n", "\r\n"),
        "\ufeff" + GOOD,
        GOOD.rstrip("\n"),
        GOOD + "\n\n",
        f"# \u00e9\n{GOOD}",
    ],
    ids=["CRLF", "BOM", "no newline", "newlines", "accents"],
)
def test_files_saved_by_editors_are_read(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "credentials", content)
    assert read_credentials(str(path))[:2] == ("a key", "a secret")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\x00" * 100,
        random.Random(1).randbytes(1000),
        GOOD.encode("utf-16"),
        b'access_key = "a\x00key"\nsecret_key = "the-secret"',
        b'access_key = "a\\u202ekey"\nsecret_key = "the-secret"',
        b"access_key = " + b"[" * 30_000,
        b"access_key = " + b"9" * 30_000,
        b"a." * 2_000 + b"a = 1",
        b"{" * 30_000,
        b"x" * (SIZE_LIMIT + 1),
    ],
    ids=lambda content: repr(content[:20]),
)
def test_other_content_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "credentials", content)
    for read in (read_credentials, load_key_ring):
        with pytest.raises(ConfigError) as refused:
            read(str(path))
        assert "\n" not in str(refused.value)
        assert "the-secret" not in str(refused.value)


def test_special_files_are_refused_without_blocking(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    certificate = authority.issue("node")
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "loop").symlink_to("loop")
    for path in map(str, ("/dev/zero", tmp_path / "fifo", tmp_path, tmp_path / "loop", "/proc")):
        good = {"endpoint": "https://minio", "ca_file": str(authority.file)}
        chain = {"cert_file": str(certificate.cert_file), "key_file": str(certificate.key_file)}
        for setting in ("ca_file", "cert_file", "key_file"):
            config = msgspec.convert({**good, **chain, setting: path}, MinioConfig)
            with pytest.raises(ConfigError, match=f"^minio.{setting}: "):
                tls_context(config)
        with pytest.raises(ConfigError, match="name another file"):
            read_private(path, "setting")
        with pytest.raises(ConfigError, match="name another file"):
            load_config(Path(path), {}, {})


@needs_root
def test_a_private_key_readable_by_our_group_is_used(place: Path) -> None:
    authority = Authority(place / "authority")
    certificate = authority.issue("node")
    for path in (authority.file.parent, *authority.file.parent.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    config = MinioConfig(
        endpoint="https://minio",
        ca_file=str(authority.file),
        cert_file=str(certificate.cert_file),
        key_file=str(certificate.key_file),
    )
    assert "other users can read" in as_user(lambda: tls_context(config))
    os.chown(certificate.key_file, 0, FS_GROUP)
    certificate.key_file.chmod(0o440)
    assert as_user(lambda: tls_context(config)) == ""
