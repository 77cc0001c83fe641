"""The key file is read only if it is private, and its keys never appear in errors."""

import hashlib
import os
from pathlib import Path

import pytest

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.encryption.keys import load_key_ring

# Constant across processes: they appear in test names, which pytest-xdist compares.
OLD, NEW = (hashlib.sha256(name).hexdigest() for name in (b"old", b"new"))
GOOD = f'write = "new-1"\n[keys]\nnew-1 = "{NEW}"\n2026_05 = "{OLD.upper()}"\n'


def write(path: Path, content: str, mode: int = 0o600) -> str:
    path.write_text(content)
    path.chmod(mode)
    return str(path)


def test_one_key_encrypts_and_all_decrypt(tmp_path: Path) -> None:
    ring = load_key_ring(write(tmp_path / "keys.toml", GOOD))
    assert ring.write == "new-1"
    assert ring.keys == {"new-1": bytes.fromhex(NEW), "2026_05": bytes.fromhex(OLD)}


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o620, 0o777])
def test_file_readable_by_others_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match=r"^minio\.encryption_key_file: .* chmod 600"):
        load_key_ring(write(tmp_path / "keys.toml", GOOD, mode))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.toml", GOOD)
    os.chown(path, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to uid 65534"):
        load_key_ring(path)


def test_path_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"^minio\.encryption_key_file: "):
            load_key_ring(str(path))


@pytest.mark.parametrize(
    "content",
    [
        "",
        f"{NEW}",
        f'write = "new"\nnew = "{NEW}"',
        f'[keys]\nnew = "{NEW}"',
        f'write = "gone"\n[keys]\nnew = "{NEW}"',
        f'write = "New"\n[keys]\nNew = "{NEW}"',
        f'write = "new"\n[keys]\nnew = "{NEW[:-1]}"',
        f'write = "new"\n[keys]\nnew = "{NEW}"\nnew = "{OLD}"',
        f'write = "new"\nread = "{OLD}"\n[keys]\nnew = "{NEW}"',
        f'write = "new"\n[keys]\nnew = {NEW}',
        f'write = "new"\n[keys]\n"{NEW}{NEW}" = "new"\nnew = "{NEW}"',
        f'write = "new"\nkeys = "{NEW}"',
    ],
)
def test_malformed_file_gives_one_line_without_keys(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"^minio\.encryption_key_file: ") as refused:
        load_key_ring(write(tmp_path / "keys.toml", content))
    assert "\n" not in str(refused.value)
    assert NEW[:8] not in str(refused.value)
    assert refused.value.__cause__ is None


def test_repr_shows_no_key(tmp_path: Path) -> None:
    ring = load_key_ring(write(tmp_path / "keys.toml", GOOD))
    assert "new-1" in repr(ring)
    for key in ring.keys.values():
        assert repr(key) not in repr(ring)
        assert key.hex() not in repr(ring)
