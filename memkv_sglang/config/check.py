"""Checks over a whole configuration that need nothing but its values."""

import ipaddress
import os
import re
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import Config, MinioConfig, NvmeConfig

Name = Callable[[str], str]
"""Gives what the user called a setting, by its key."""

MAX_SOCKET_PATH = 107
"""Bytes: `sun_path` has 108 with its final zero, unix(7)."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX_PART = re.compile(r"[A-Za-z0-9!_.*'()-]{1,255}")
_MAX_PREFIX = 512
_KMS_KEY = re.compile(r"[A-Za-z0-9_./:-]{0,256}")
_REGION = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def check_config(config: Config, name: Name) -> None:
    """Raise `ConfigError` at the first setting that cannot work."""
    check_socket(config.agent.socket, name("agent.socket"))
    _check_watermarks(config.nvme, name)
    _check_bucket(config.minio.bucket, name("minio.bucket"))
    _check_prefix(config.minio.prefix, name("minio.prefix"))
    _check_region(config.minio.region, name("minio.region"))
    for url in endpoint_urls(config.minio):
        _check_endpoint(url, config.minio, name)
    _check_credentials(config.minio, name)
    _check_client_certificate(config.minio, name)
    _check_certificate_login(config.minio, name)
    _check_sse(config.minio, name)


def endpoint_urls(config: MinioConfig) -> list[str]:
    """Return the endpoint's URLs, one by one; none if there is no MinIO tier."""
    return [url.strip() for url in config.endpoint.split(",")] if config.endpoint else []


def check_socket(path: str, name: str) -> None:
    """Raise `ConfigError` if the path is longer than the kernel allows."""
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise ConfigError(
            f"{name}: the path has {length} bytes, a Unix socket's may have {MAX_SOCKET_PATH}; "
            "name a shorter one"
        )


def _check_watermarks(config: NvmeConfig, name: Name) -> None:
    if config.low_watermark >= config.high_watermark:
        raise ConfigError(
            f"{name('nvme.low_watermark')}: {config.low_watermark:g} is not below "
            f"{name('nvme.high_watermark')} = {config.high_watermark:g}; eviction goes from the "
            "high one down to the low one"
        )


def _check_bucket(bucket: str, name: str) -> None:
    """S3's rules for bucket names as MinIO enforces them, and the one name it keeps for itself."""
    problem = ""
    if not _BUCKET.fullmatch(bucket):
        problem = "needs 3 to 63 of a-z, 0-9, '-' and '.', a letter or digit first and last"
    elif any(pair in bucket for pair in ("..", ".-", "-.")):
        problem = "may not have '.' beside '.' or '-'"
    elif is_address(bucket):
        problem = "may not look like an IP address"
    elif bucket == "minio":
        problem = "is MinIO's own"
    if problem:
        raise ConfigError(f"{name}: {bucket!r} {problem}; choose another, e.g. memkv")


def _check_prefix(prefix: str, name: str) -> None:
    parts = prefix.split("/") if prefix else []
    valid = all(_PREFIX_PART.fullmatch(part) and part not in (".", "..") for part in parts)
    if not valid or len(prefix) > _MAX_PREFIX:
        raise ConfigError(
            f"{name}: {prefix[:60]!r} is no prefix; write names of letters, digits and !_.*'()- "
            f"with one '/' between them, none at the ends, at most {_MAX_PREFIX} characters"
        )


def _check_region(region: str, name: str) -> None:
    if not _REGION.fullmatch(region):
        raise ConfigError(f"{name}: {region[:60]!r} is no region; the usual one is us-east-1")


def _check_endpoint(url: str, config: MinioConfig, name: Name) -> None:
    # The URL is only repeated once it is known to carry no password.
    endpoint = name("minio.endpoint")
    if "@" in url:
        raise ConfigError(
            f"{endpoint}: a URL with user or password; remove them and set "
            "MEMKV_MINIO_ACCESS_KEY and MEMKV_MINIO_SECRET_KEY"
        )
    example = "write it as http://minio:9000 or https://minio:9000"
    parts = split_url(url)
    if parts is None:
        raise ConfigError(f"{endpoint}: {url[:60]!r} is not a URL; {example}")
    if parts.scheme not in ("http", "https"):
        raise ConfigError(f"{endpoint}: {url[:60]!r} has no scheme http or https; {example}")
    rest = url[len(f"{parts.scheme}://{parts.netloc}") :]
    if rest:
        raise ConfigError(
            f"{endpoint}: {url[:60]!r} has a path or query; remove {rest[:60]!r}"
            " (`minio.bucket` and `minio.prefix` say where pages go)"
        )
    if config.require_tls and parts.scheme != "https":
        raise ConfigError(
            f"{endpoint}: {url[:60]!r} is not https, which {name('minio.require_tls')} demands; "
            "use an https URL or do not demand TLS"
        )
    if config.addressing == "virtual" and is_address(parts.hostname or ""):
        raise ConfigError(
            f"{name('minio.addressing')}: virtual needs a host name, {url[:60]!r} has an address; "
            "use one or addressing path"
        )


def split_url(url: str) -> SplitResult | None:
    """Return the URL's parts, None if it has no host that could be connected to."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    valid_host = parts.hostname and not re.search(r"[\s\\]", parts.netloc)
    empty_port = parts.netloc.endswith(":")
    return parts if valid_host and port != 0 and not empty_port else None


def _check_credentials(config: MinioConfig, name: Name) -> None:
    given = {"access_key": config.access_key, "secret_key": config.secret_key}
    missing = [field for field, value in given.items() if not value]
    if config.credentials_file and len(missing) < 2:
        raise ConfigError(
            f"{name('minio.credentials_file')}: given beside minio.access_key or "
            "minio.secret_key; remove one or the other"
        )
    if len(missing) != 1:
        return
    other = next(field for field, value in given.items() if value)
    raise ConfigError(
        f"{name(f'minio.{other}')}: given without minio.{missing[0]}; set "
        f"MEMKV_MINIO_{missing[0].upper()} too, or neither"
    )


def _check_client_certificate(config: MinioConfig, name: Name) -> None:
    if bool(config.cert_file) != bool(config.key_file):
        given, other = ("cert", "key") if config.cert_file else ("key", "cert")
        raise ConfigError(
            f"{name(f'minio.{given}_file')}: given without minio.{other}_file; set both or neither"
        )


def _check_certificate_login(config: MinioConfig, name: Name) -> None:
    if not config.certificate_login:
        return
    login = name("minio.certificate_login")
    if not config.cert_file:
        raise ConfigError(f"{login}: needs minio.cert_file and minio.key_file; set them too")
    if config.access_key or config.credentials_file:
        other = "credentials_file" if config.credentials_file else "access_key"
        raise ConfigError(f"{login}: given beside minio.{other}; remove one or the other")
    if any(url.startswith("http:") for url in endpoint_urls(config)):
        raise ConfigError(
            f"{login}: needs https, {name('minio.endpoint')} has an http URL; change one of them"
        )


def _check_sse(config: MinioConfig, name: Name) -> None:
    if (config.sse == "kms") != bool(config.sse_kms_key):
        raise ConfigError(
            f"{name('minio.sse_kms_key')}: goes with {name('minio.sse')} = kms alone; set both or "
            "neither"
        )
    if not _KMS_KEY.fullmatch(config.sse_kms_key):
        raise ConfigError(
            f"{name('minio.sse_kms_key')}: {config.sse_kms_key[:60]!r} is no name of a key; write "
            "it of letters, digits and _-./:"
        )
    if config.sse == "kms" and any(url.startswith("http:") for url in endpoint_urls(config)):
        raise ConfigError(
            f"{name('minio.sse')}: kms needs https, {name('minio.endpoint')} has an http URL; use "
            "https or SSE-S3"
        )


def is_address(host: str) -> bool:
    """Tell whether a host is given by address and not by name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
