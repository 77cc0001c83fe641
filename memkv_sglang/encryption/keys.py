"""The encryption keys. One key encrypts new pages, and all keys can decrypt.

The key file is TOML. Every stored page names the id of its key, so never reuse an id:

    write = "2026-11"

    [keys]
    2026-11 = "64 hexadecimal digits, as printed by: openssl rand -hex 32"
    2026-05 = "the previous key, kept as long as its pages should be readable"
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.private import parse_toml, read_private

KEY_SIZE = 32
"""Bytes per key (AES-256)."""

SETTING = "minio.encryption_key_file"

# lower case only, because ids are sent in HTTP header fields
_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_DIGITS = re.compile(rf"[0-9A-Fa-f]{{{2 * KEY_SIZE}}}")


@dataclass(frozen=True)
class KeyRing:
    """The keys of a key file. Its `repr` shows none of them."""

    write: str
    """Id of the key that encrypts new pages."""
    keys: Mapping[str, bytes] = field(repr=False)


def load_key_ring(path: str) -> KeyRing:
    """Read a key file. Raises `ConfigError`, whose message quotes no key."""
    content = read_private(path, SETTING)
    try:
        document = parse_toml(content)
    except ValueError:  # Do not chain the exception: its message may quote a key.
        raise ConfigError(
            f"{SETTING}: {path} is not TOML; write it as docs/security.md shows"
        ) from None
    return KeyRing(_parse_write(document, path), _parse_keys(document, path))


def _parse_keys(document: Mapping[str, Any], path: str) -> dict[str, bytes]:
    table = document.get("keys")
    if not isinstance(table, dict) or not table:
        raise ConfigError(f"{SETTING}: {path} has no keys; add a table [keys]")
    for position, (name, digits) in enumerate(table.items(), 1):
        if not _ID.fullmatch(name):
            raise ConfigError(
                f"{SETTING}: id {position} in {path} is not 1 to 32 of a-z, 0-9, '_' and '-'; "
                "rename it"
            )
        if not isinstance(digits, str) or not _DIGITS.fullmatch(digits):
            raise ConfigError(
                f"{SETTING}: key {name!r} in {path} is not {2 * KEY_SIZE} hexadecimal digits in "
                "quotes; make one with: openssl rand -hex 32"
            )
    return {name: bytes.fromhex(digits) for name, digits in table.items()}


def _parse_write(document: Mapping[str, Any], path: str) -> str:
    write, known = document.get("write"), document.get("keys")
    if unknown := document.keys() - {"write", "keys"}:
        raise ConfigError(
            f"{SETTING}: {path} has {len(unknown)} entries besides `write` and [keys]; remove them"
        )
    if not isinstance(write, str) or not isinstance(known, dict) or write not in known:
        raise ConfigError(
            f"{SETTING}: {path} does not say which key encrypts new pages; add "
            'write = "ID" above [keys], with the id of one of the keys'
        )
    return write
