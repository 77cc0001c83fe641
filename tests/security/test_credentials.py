"""Keys that change while an agent runs, with real users created and removed on a real MinIO."""

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from memkv_testbed.minio_server import MinioServer
from minio.credentials import Credentials  # type: ignore[attr-defined]  # missing from its __all__
from minio.credentials.providers import AssumeRoleProvider, StaticProvider
from minio.minioadmin import MinioAdmin

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import load_config
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.testing.conformance import LENGTHS, load, soon, spill
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, TierError
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.auth import credentials, credentials_file, signing
from memkv_sglang.tiers.minio.auth.signing import Signer

OpenTier = Callable[[MinioConfig], MinioTier]
NAMESPACE = make_namespace()
KEYS = make_chain(NAMESPACE, 40).keys()


class Users:
    """Users of a MinIO with all permissions."""

    def __init__(self, server: MinioServer) -> None:
        root = StaticProvider(*server.root)
        self.admin = MinioAdmin(
            endpoint=server.endpoint.partition("://")[2], credentials=root, secure=False
        )
        self.names: set[str] = set()

    def add(self, name: str = "") -> tuple[str, str]:
        """Create a user, or give it a new secret."""
        name, secret = name or secrets.token_hex(8), secrets.token_hex(16)
        self.admin.user_add(name, secret)
        if name not in self.names:
            self.admin.attach_policy(["readwrite"], user=name)
        self.names.add(name)
        return name, secret

    def remove(self, name: str) -> None:
        self.admin.user_remove(name)
        self.names.discard(name)


@pytest.fixture
def users(minio_server: MinioServer) -> Iterator[Users]:
    users = Users(minio_server)
    yield users
    for name in list(users.names):
        users.remove(name)


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing, "RENEW_PAUSE", 0.05)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "credentials.toml"


@pytest.fixture
def config(minio_config: MinioConfig, file: Path) -> MinioConfig:
    return msgspec.structs.replace(
        minio_config, access_key="", secret_key="", credentials_file=str(file), negative_ttl=0
    )


def write(file: Path, access_key: str, secret_key: str, session_token: str = "") -> None:
    """Replace the file atomically, as secret stores do."""
    values = {"access_key": access_key, "secret_key": secret_key}
    if session_token:
        values["session_token"] = session_token
    new = file.with_suffix(".new")
    new.write_text("".join(f'{name} = "{value}"\n' for name, value in values.items()))
    new.chmod(0o600)
    new.rename(file)


def refused(tier: MinioTier) -> bool:
    """Return whether the server rejects a load."""
    page = make_page(KEYS[0], LENGTHS, filled=False)
    return tier.load([page], soon()) == [LoadResult.FAILED]


def use_control_path(tier: MinioTier) -> None:
    tier.describe(make_namespace(model=secrets.token_hex(4)))
    assert tier.remove(KEYS[-1:]) in (0, 1)
    assert tier.namespaces()


def test_keys_are_replaced_without_a_miss(
    config: MinioConfig, file: Path, users: Users, open_tier: OpenTier
) -> None:
    """Write a new user to the file, then remove the old one: no load misses and no call fails."""
    old = users.add()
    write(file, *old)
    tier = open_tier(config)
    spill(tier, KEYS[:8])
    write(file, *users.add())
    users.remove(old[0])
    load(tier, KEYS[:8])
    assert tier.lookup(make_chain(NAMESPACE, 40), soon()) == (8, True)
    spill(tier, KEYS[8:16])
    use_control_path(tier)


@pytest.mark.parametrize("path", ["pages", "control"])
def test_each_path_reads_new_keys_by_itself(
    config: MinioConfig, file: Path, users: Users, open_tier: OpenTier, path: str
) -> None:
    old = users.add()
    write(file, *old)
    tier = open_tier(config)
    spill(tier, KEYS[:1])
    use_control_path(tier)
    write(file, *users.add())
    users.remove(old[0])
    if path == "pages":
        load(tier, KEYS[:1])
    else:
        use_control_path(tier)


def test_new_secret_of_the_same_user(
    config: MinioConfig, file: Path, users: Users, open_tier: OpenTier
) -> None:
    """The server gets the new secret first: loads miss until the file has it too."""
    name, secret = users.add()
    write(file, name, secret)
    tier = open_tier(config)
    spill(tier, KEYS)
    _, new = users.add(name)
    assert refused(tier)
    write(file, name, new)
    give_up = time.monotonic() + 20
    while refused(tier):
        assert time.monotonic() < give_up
    load(tier, KEYS)
    use_control_path(tier)


def test_changed_file_is_read_without_a_rejected_request(
    config: MinioConfig,
    file: Path,
    users: Users,
    open_tier: OpenTier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(credentials, "FILE_LIFETIME", credentials.FILE_LIFETIME * 0)
    old, new = users.add(), users.add()
    write(file, *old)
    tier = open_tier(config)
    spill(tier, KEYS)
    used: list[str] = []
    for name in ("head", "template"):  # methods of the slow path and of the fast path
        sign = getattr(Signer, name)

        def spy(
            signer: Signer, credentials: Credentials, *arguments: Any, sign: Any = sign
        ) -> object:
            used.append(credentials.access_key)
            return sign(signer, credentials, *arguments)

        monkeypatch.setattr(Signer, name, spy)
    write(file, *new)
    load(tier, KEYS)
    assert set(used) == {new[0]}


def test_temporary_keys_with_a_session_token(
    minio_server: MinioServer, config: MinioConfig, file: Path, users: Users, open_tier: OpenTier
) -> None:
    def assume() -> tuple[str, str, str]:
        access_key, secret_key = users.add()
        keys = AssumeRoleProvider(
            sts_endpoint=minio_server.endpoint,
            access_key=access_key,
            secret_key=secret_key,
            duration_seconds=900,
        ).retrieve()
        return keys.access_key, keys.secret_key, keys.session_token or ""

    write(file, *assume())
    tier = open_tier(config)
    spill(tier, KEYS[:4])
    withdrawn = users.names.copy()
    write(file, *assume())
    for name in withdrawn:
        users.remove(name)
    load(tier, KEYS[:4])
    use_control_path(tier)


def test_standard_chain_is_queried_again(
    config: MinioConfig,
    users: Users,
    open_tier: OpenTier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "aws"

    def write_profile(access_key: str, secret_key: str) -> None:
        lines = ["[default]", f"aws_access_key_id={access_key}"]
        file.write_text("\n".join([*lines, f"aws_secret_access_key={secret_key}"]))

    for variable in list(os.environ):
        if variable.startswith(("MINIO_", "AWS_")):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    old = users.add()
    write_profile(*old)
    tier = open_tier(msgspec.structs.replace(config, credentials_file=""))
    spill(tier, KEYS)
    write_profile(*users.add())
    users.remove(old[0])
    load(tier, KEYS)
    use_control_path(tier)


def test_unusable_new_file_is_reported_once_and_the_old_keys_stay(
    config: MinioConfig,
    file: Path,
    users: Users,
    open_tier: OpenTier,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(credentials, "FILE_LIFETIME", credentials.FILE_LIFETIME * 0)
    name, secret = users.add()
    write(file, name, secret)
    tier = open_tier(config)
    spill(tier, KEYS)
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            load(tier, KEYS)
    [record] = caplog.records
    assert "chmod 600" in str(vars(record))
    assert secret not in str(vars(record))


def test_rejected_requests_do_not_each_reread_the_source(
    config: MinioConfig,
    file: Path,
    users: Users,
    open_tier: OpenTier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signing, "RENEW_PAUSE", 3600.0)
    name, secret = users.add()
    write(file, name, secret)
    tier = open_tier(config)
    spill(tier, KEYS)
    users.remove(name)
    reads: list[str] = []
    read = credentials_file.read_credentials

    def spy(path: str) -> object:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(credentials, "read_credentials", spy)
    threads = [threading.Thread(target=refused, args=[tier]) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused(tier)
    assert len(reads) <= 2  # one more read, because the first keys had expired


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660])
def test_file_readable_by_others_is_rejected_first(
    config: MinioConfig, file: Path, mode: int
) -> None:
    write(file, "key", "secret")
    file.chmod(mode)
    with pytest.raises(ConfigError, match=r"^minio\.credentials_file: .* chmod 600"):
        MinioTier(config)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "the-secret",
        'access_key = "the-secret"',
        'access_key = "a"\nsecret_key = "the-secret"\nextra = 1',
        'access_key = "a"\nsecret_key = "the-secret\\nx"',
        'access_key = 7\nsecret_key = "the-secret"',
        'secret_key = "the-secret"\nsecret_key = "the-secret"',
    ],
)
def test_malformed_file_is_one_line_without_its_content(
    config: MinioConfig, file: Path, content: str
) -> None:
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=r"^minio\.credentials_file: ") as broken:
        MinioTier(config)
    assert "\n" not in str(broken.value)
    assert "the-secret" not in str(broken.value)


def test_missing_file_and_two_sources_are_rejected(config: MinioConfig) -> None:
    with pytest.raises(ConfigError, match=r"^minio\.credentials_file: cannot read"):
        MinioTier(config)
    both = {"MEMKV_MINIO_ACCESS_KEY": "a", "MEMKV_MINIO_SECRET_KEY": "b"}
    with pytest.raises(ConfigError, match=r"^MEMKV_MINIO_CREDENTIALS_FILE: cannot be combined"):
        load_config(None, both | {"MEMKV_MINIO_CREDENTIALS_FILE": "/f"}, {})


def test_no_credentials_is_one_line(
    config: MinioConfig, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in list(os.environ):
        if variable.startswith(("MINIO_", "AWS_")):
            monkeypatch.delenv(variable)
    (tmp_path / "mc.json").write_text(json.dumps({}))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:1/none")
    tier = open_tier(msgspec.structs.replace(config, credentials_file=""))
    with pytest.raises(TierError, match="no credentials for MinIO: set"):
        tier.check(soon())
