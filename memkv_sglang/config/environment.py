"""Check a configuration against this machine. Checks change nothing."""

import os
import ssl
from contextlib import suppress
from pathlib import Path

from memkv_sglang.config.check import Name
from memkv_sglang.config.errors import BrokenDiskError, ConfigError
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.private import open_regular
from memkv_sglang.config.schema import NvmeConfig
from memkv_sglang.config.shards import has_minio
from memkv_sglang.config.units import format_size


def check_environment(loaded: LoadedConfig) -> None:
    """Raise `ConfigError` for the first setting that does not work on this machine.

    A broken disk is not an error, because the agent can run without its NVMe tier.
    """
    check_any_tier(loaded)
    for disk in loaded.config.nvme.for_each_directory():
        with suppress(BrokenDiskError, OSError):
            check_directory(disk, loaded.name)
            check_capacity(disk, loaded.name)
    check_ca_file(loaded)


def check_any_tier(loaded: LoadedConfig) -> None:
    """Raise `ConfigError` if no tier is configured."""
    if not loaded.config.nvme.directory and not has_minio(loaded.config.minio):
        raise ConfigError(
            "nvme.directory, minio.endpoint: both are empty, so there is no tier; set at least "
            "one, e.g. --nvme-directory /var/cache/memkv"
        )


def check_directory(config: NvmeConfig, called: Name) -> None:
    """Raise `ConfigError` unless the directory is ours and writable, or can be created.

    `config` has a single directory. Raises `BrokenDiskError` if it is ours but its file system is
    read-only, as after a disk error (ext4: `errors=remount-ro`).
    """
    name = called("nvme.directory")
    directory = Path(config.directory).absolute()
    place = existing_part(directory)
    if not place.is_dir():
        raise ConfigError(f"{name}: {place} is not a directory; choose another path")
    owner = place.stat().st_uid
    if place == directory and owner != os.geteuid():
        raise ConfigError(
            f"{name}: {directory} belongs to uid {owner}, but this is uid {os.geteuid()}; "
            "run as that user, or choose a directory of your own"
        )
    if place == directory and os.statvfs(place).f_flag & os.ST_RDONLY:
        raise BrokenDiskError(
            f"{name}: the file system of {place} is read-only; check the kernel log for disk "
            "errors, or choose another directory"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        uid = os.geteuid()
        advice = (
            "change its mode"
            if place == directory
            else f"let root run `install -d -o {uid} -m 0700 {directory}`"
        )
        raise ConfigError(
            f"{name}: {place} is not writable for uid {uid}; {advice}, or choose another directory"
        )
    if not _file_system_size(place):  # for example /proc, which root may write to
        raise ConfigError(
            f"{name}: the file system of {place} has no space for files; choose another directory"
        )


def check_capacity(config: NvmeConfig, called: Name) -> None:
    """Raise `ConfigError` if the capacity exceeds the size of the file system."""
    place = existing_part(Path(config.directory).absolute())
    size = _file_system_size(place)
    if config.capacity > size:
        raise ConfigError(
            f"{called('nvme.capacity')}: {format_size(config.capacity)} exceeds the file "
            f"system of {place} ({size / 2**30:.1f} GiB); set less or use a larger disk"
        )


def _file_system_size(place: Path) -> int:
    status = os.statvfs(place)
    return status.f_blocks * status.f_frsize


def check_ca_file(loaded: LoadedConfig) -> None:
    """Raise `ConfigError` if a CA file for MinIO is set but has no readable CA certificates."""
    if loaded.config.minio.ca_file:
        trusting_context(loaded.config.minio.ca_file, loaded.name("minio.ca_file"))
    for shard in loaded.config.minio.shards:
        if shard.ca_file:
            trusting_context(
                shard.ca_file, f"{loaded.name('minio.shards')}: shard {shard.name}, ca_file"
            )


def trusting_context(path: str, name: str) -> ssl.SSLContext:
    """Return a TLS context that trusts the CAs in a PEM file, or the system's if the path is empty.

    `name` is the setting as the user wrote it. Raises `ConfigError`.
    """
    if not path:
        return ssl.create_default_context()
    with open_regular(path, name, "name a PEM file") as descriptor:
        try:
            return ssl.create_default_context(cafile=f"/proc/self/fd/{descriptor}")
        except (OSError, ValueError) as error:
            reason = "no PEM certificates" if isinstance(error, ssl.SSLError) else str(error)
            raise ConfigError(f"{name}: cannot use {path} ({reason}); name a PEM file") from None


def existing_part(path: Path) -> Path:
    """Return the path, or its nearest ancestor that exists and is accessible."""
    for place in (path, *path.parents):
        try:
            place.stat()
        except FileNotFoundError:
            continue
        except OSError:  # a component is not a directory or not searchable
            return existing_part(place.parent)
        return place
    return Path("/")
