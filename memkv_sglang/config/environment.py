"""Checks of a configuration against this machine: they look, and change nothing."""

import os
import ssl
from contextlib import suppress
from pathlib import Path

from memkv_sglang.config.check import Name
from memkv_sglang.config.errors import BrokenDiskError, ConfigError
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.private import open_regular
from memkv_sglang.config.schema import NvmeConfig
from memkv_sglang.config.units import format_size


def check_environment(loaded: LoadedConfig) -> None:
    """Raise `ConfigError` at the first setting that this machine cannot fulfil."""
    check_any_tier(loaded)
    if loaded.config.nvme.directory:
        with suppress(BrokenDiskError, OSError):  # who opens it finds out, and may do without
            check_directory(loaded.config.nvme, loaded.name)
            check_capacity(loaded.config.nvme, loaded.name)
    check_ca_file(loaded)


def check_any_tier(loaded: LoadedConfig) -> None:
    """Demand a place for pages."""
    if not loaded.config.nvme.directory and not loaded.config.minio.endpoint:
        raise ConfigError(
            "nvme.directory, minio.endpoint: both are empty, so pages have no place; set at "
            "least one, e.g. --nvme-directory /var/cache/memkv"
        )


def check_directory(config: NvmeConfig, called: Name) -> None:
    """Demand an NVMe directory that is ours and writable, or can be made.

    Raises `BrokenDiskError` for one of ours on a file system that is read-only, as the kernel makes
    a damaged one (ext4: `errors=remount-ro`).
    """
    name = called("nvme.directory")
    directory = Path(config.directory).absolute()
    place = existing_part(directory)
    if not place.is_dir():
        raise ConfigError(f"{name}: {place} is not a directory; name another path")
    owner = place.stat().st_uid
    if place == directory and owner != os.geteuid():
        raise ConfigError(
            f"{name}: {directory} belongs to uid {owner}, this is uid {os.geteuid()}; name a "
            "directory of your own"
        )
    if place == directory and os.statvfs(place).f_flag & os.ST_RDONLY:
        raise BrokenDiskError(
            f"{name}: the file system of {place} is read-only; see what the kernel's log says of "
            "its disk, or name another directory"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name}: {place} is not writable for uid {os.geteuid()}; change its mode or name "
            "another directory"
        )
    if not _file_system_size(place):  # such as /proc, which root may write to
        raise ConfigError(
            f"{name}: the file system of {place} has no space for files; name another directory"
        )


def check_capacity(config: NvmeConfig, called: Name) -> None:
    """Demand a file system at least as large as the capacity."""
    place = existing_part(Path(config.directory).absolute())
    size = _file_system_size(place)
    if config.capacity > size:
        raise ConfigError(
            f"{called('nvme.capacity')}: {format_size(config.capacity)} is more than the file "
            f"system of {place} has ({size / 2**30:.1f} GiB); write less or name a larger disk"
        )


def _file_system_size(place: Path) -> int:
    status = os.statvfs(place)
    return status.f_blocks * status.f_frsize


def check_ca_file(loaded: LoadedConfig) -> None:
    """Demand that the file of trusted authorities can be read and holds some."""
    if loaded.config.minio.ca_file:
        trusting_context(loaded.config.minio.ca_file, loaded.name("minio.ca_file"))


def trusting_context(path: str, name: str) -> ssl.SSLContext:
    """Return a TLS context that trusts a PEM file's authorities, or without one the system's.

    `name` is what the user called the setting. Raises `ConfigError`.
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
    """Return the path, or the nearest directory above it that exists and can be seen."""
    for place in (path, *path.parents):
        try:
            place.stat()
        except FileNotFoundError:
            continue
        except OSError:  # a part is no directory, or may not be entered
            return existing_part(place.parent)
        return place
    return Path("/")
