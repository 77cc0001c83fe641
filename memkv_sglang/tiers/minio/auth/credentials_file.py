"""Read the TOML file named by `minio.credentials_file`, with the keys that sign requests."""

from typing import NamedTuple

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.private import parse_toml, read_private

SETTING = "minio.credentials_file"


class FileCredentials(NamedTuple):
    """The content of the file."""

    access_key: str
    secret_key: str
    session_token: str | None


def read_credentials(path: str) -> FileCredentials:
    """Read the file. Raises `ConfigError`, whose message quotes nothing from the file."""
    content = read_private(path, SETTING)
    try:
        document = parse_toml(content)
    except ValueError:  # Do not chain the exception: its message may quote a secret.
        raise ConfigError(
            f'{SETTING}: {path} is not TOML; write access_key = "..." and secret_key = "..."'
        ) from None
    values = [document.get(name, "") for name in FileCredentials._fields]
    valid = all(isinstance(value, str) and value.isprintable() for value in values)
    if document.keys() - set(FileCredentials._fields) or not valid or not all(values[:2]):
        raise ConfigError(
            f"{SETTING}: {path} must give access_key and secret_key, perhaps session_token, and "
            "nothing else; put each in quotes"
        )
    return FileCredentials(values[0], values[1], values[2] or None)
