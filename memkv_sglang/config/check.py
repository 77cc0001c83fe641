"""Check whether the values of a configuration are valid, without looking at the machine."""

import ipaddress
import os
import re
from collections.abc import Callable, Container
from urllib.parse import SplitResult, urlsplit

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import (
    AgentConfig,
    Config,
    EngineConfig,
    MinioConfig,
    NvmeConfig,
    split_paths,
)
from memkv_sglang.config.shards import own_settings, shard_configs

Name = Callable[[str], str]
"""Returns the name of a setting as the user wrote it, given its key."""

MAX_SOCKET_PATH = 107
"""Longest path of a Unix socket in bytes. `sun_path` has 108, with the final zero; see unix(7)."""

MAX_SHARDS = 64
"""Maximum number of shards. Each has its own connections and threads, and serves all nodes."""

MIN_SALT = 16
"""Minimum length of a salt in characters."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX_PART = re.compile(r"[A-Za-z0-9!_.*'()-]{1,255}")
_MAX_PREFIX = 512
_KMS_KEY = re.compile(r"[A-Za-z0-9_./:-]{0,256}")
_REGION = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def check_config(config: Config, name: Name) -> None:
    """Raise `ConfigError` at the first setting whose value is invalid."""
    check_socket(config.agent.socket, name("agent.socket"))
    _check_upload(config.engine, name)
    _check_salt(config.recorder.salt, name("recorder.salt"))
    _check_http(config.agent, name)
    _check_directories(config.nvme, name)
    _check_watermarks(config.nvme, name)
    _check_minio(config.minio, name)
    _check_shards(config.minio, name)


def _check_minio(config: MinioConfig, name: Name, variables: str = "MEMKV_MINIO") -> None:
    """Check the settings of one server or cluster.

    The variables with its secrets begin with `variables`.
    """
    _check_bucket(config.bucket, name("minio.bucket"))
    _check_prefix(config.prefix, name("minio.prefix"))
    _check_region(config.region, name("minio.region"))
    for url in endpoint_urls(config):
        _check_endpoint(url, config, name, variables)
    _check_credentials(config, name, variables)
    _check_pair("minio.", config.cert_file, config.key_file, name)
    _check_certificate_login(config, name)
    _check_sse(config, name)


def _check_shards(config: MinioConfig, name: Name) -> None:
    called = name("minio.shards")
    if config.replicas > max(len(config.shards), 1):
        raise ConfigError(
            f"{name('minio.replicas')}: {config.replicas} needs at least as many shards, but there "
            f"are {len(config.shards)}; add some in [[minio.shards]], or set it to 1"
        )
    if not config.shards:
        return
    if config.endpoint:
        raise ConfigError(
            f"{name('minio.endpoint')}: cannot be combined with {called}; remove it, or make it "
            "the endpoint of a shard"
        )
    if len(config.shards) > MAX_SHARDS:
        raise ConfigError(
            f"{called}: {len(config.shards)} are too many; use at most {MAX_SHARDS}, for instance "
            "clusters of several servers"
        )
    places: dict[tuple[str, str, str], str] = {}
    complete = shard_configs(config)
    for shard in config.shards:
        one, own = complete[shard.name], own_settings(shard)
        if not shard.endpoint:
            raise ConfigError(f"{called}: shard {shard.name} has no endpoint; set it")
        if [other.name for other in config.shards].count(shard.name) > 1:
            raise ConfigError(f"{called}: two shards are named {shard.name}; rename one")
        variables = f"MEMKV_MINIO_SHARD_{shard.name.upper().replace('-', '_')}"
        _check_minio(one, _names_in_shard(shard.name, own, name), variables)
        for url in endpoint_urls(one):
            place = (url, one.bucket, one.prefix)
            if other := places.get(place):
                raise ConfigError(
                    f"{called}: shards {other} and {shard.name} have the same endpoint, bucket and "
                    "prefix; remove one of them"
                )
            places[place] = shard.name


def _names_in_shard(shard: str, own: Container[str], name: Name) -> Name:
    """Return names that also say which shard a setting belongs to, unless it is from `[minio]`."""

    def called(key: str) -> str:
        setting = key.removeprefix("minio.")
        if setting in own:
            return f"{name('minio.shards')}: shard {shard}, {setting}"
        return name(key)

    return called


def endpoint_urls(config: MinioConfig) -> list[str]:
    """Return the URLs in `endpoint`; an empty list if there is no MinIO tier."""
    return [url.strip() for url in config.endpoint.split(",")] if config.endpoint else []


def check_socket(path: str, name: str) -> None:
    """Raise `ConfigError` if the path is longer than the kernel allows."""
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise ConfigError(
            f"{name}: the path has {length} bytes, but a Unix socket's can have only "
            f"{MAX_SOCKET_PATH}; choose a shorter one"
        )


def _check_salt(salt: str, name: str) -> None:
    if salt and len(salt) < MIN_SALT:
        raise ConfigError(
            f"{name}: shorter than {MIN_SALT} characters, so hashes could be guessed; use a longer "
            "one, or none"
        )


def _check_upload(config: EngineConfig, name: Name) -> None:
    if config.upload != "always" and config.admission != "always":
        raise ConfigError(
            f"{name('engine.upload')}: {config.upload} cannot be combined with "
            f"{name('engine.admission')} = {config.admission}, which uploads every page first; set "
            "one of them to always"
        )


def _check_directories(config: NvmeConfig, name: Name) -> None:
    paths = split_paths(config.directory)
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise ConfigError(f"{name('nvme.directory')}: names {path} twice; remove one")


def _check_watermarks(config: NvmeConfig, name: Name) -> None:
    if config.low_watermark >= config.high_watermark:
        raise ConfigError(
            f"{name('nvme.low_watermark')}: {config.low_watermark:g} is not below "
            f"{name('nvme.high_watermark')} = {config.high_watermark:g}; set it lower"
        )


def _check_bucket(bucket: str, name: str) -> None:
    """Check a name against S3's rules as MinIO enforces them, and against MinIO's reserved name."""
    problem = ""
    if not _BUCKET.fullmatch(bucket):
        problem = "must be 3 to 63 of a-z, 0-9, '-' and '.', with a letter or digit first and last"
    elif any(pair in bucket for pair in ("..", ".-", "-.")):
        problem = "must not have '.' next to '.' or '-'"
    elif is_address(bucket):
        problem = "must not look like an IP address"
    elif bucket == "minio":
        problem = "is reserved by MinIO"
    if problem:
        raise ConfigError(f"{name}: {bucket!r} {problem}; choose another, e.g. memkv")


def _check_prefix(prefix: str, name: str) -> None:
    parts = prefix.split("/") if prefix else []
    valid = all(_PREFIX_PART.fullmatch(part) and part not in (".", "..") for part in parts)
    if not valid or len(prefix) > _MAX_PREFIX:
        raise ConfigError(
            f"{name}: {prefix[:60]!r} is not a valid prefix; use at most {_MAX_PREFIX} letters, "
            "digits and !_.*'()- with single '/' between names and none at the ends"
        )


def _check_region(region: str, name: str) -> None:
    if not _REGION.fullmatch(region):
        raise ConfigError(f"{name}: {region[:60]!r} is not a region; the usual one is us-east-1")


def _check_endpoint(url: str, config: MinioConfig, name: Name, variables: str) -> None:
    # A URL might contain a password, so errors quote it only after this check.
    endpoint = name("minio.endpoint")
    if "@" in url:
        raise ConfigError(
            f"{endpoint}: the URL contains a user or password; remove them and set "
            f"{variables}_ACCESS_KEY and {variables}_SECRET_KEY"
        )
    example = "write it as http://minio:9000 or https://minio:9000"
    parts = split_url(url)
    if parts is None:
        raise ConfigError(f"{endpoint}: {url[:60]!r} is not a URL; {example}")
    if parts.scheme not in ("http", "https"):
        raise ConfigError(
            f"{endpoint}: {url[:60]!r} does not begin with http:// or https://; {example}"
        )
    rest = url[len(f"{parts.scheme}://{parts.netloc}") :]
    if rest:
        raise ConfigError(
            f"{endpoint}: {url[:60]!r} has a path or query; remove {rest[:60]!r}"
            " (set `minio.bucket` and `minio.prefix` instead)"
        )
    if config.require_tls and parts.scheme != "https":
        raise ConfigError(
            f"{endpoint}: {url[:60]!r} is not https, but {name('minio.require_tls')} is set; "
            "use an https URL or turn it off"
        )
    if config.addressing == "virtual" and is_address(parts.hostname or ""):
        raise ConfigError(
            f"{name('minio.addressing')}: virtual needs a host name, but {url[:60]!r} has an "
            "address; use a host name, or path"
        )


def split_url(url: str) -> SplitResult | None:
    """Split a URL. Returns None if its host or port is invalid."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    valid_host = parts.hostname and not re.search(r"[\s\\]", parts.netloc)
    empty_port = parts.netloc.endswith(":")
    return parts if valid_host and port != 0 and not empty_port else None


def _check_credentials(config: MinioConfig, name: Name, variables: str) -> None:
    given = {"access_key": config.access_key, "secret_key": config.secret_key}
    missing = [field for field, value in given.items() if not value]
    if config.credentials_file and len(missing) < 2:
        raise ConfigError(
            f"{name('minio.credentials_file')}: cannot be combined with minio.access_key or "
            "minio.secret_key; remove one of them"
        )
    if len(missing) != 1:
        return
    other = next(field for field, value in given.items() if value)
    raise ConfigError(
        f"{name(f'minio.{other}')}: set without minio.{missing[0]}; set "
        f"{variables}_{missing[0].upper()} too, or neither"
    )


def _check_http(config: AgentConfig, name: Name) -> None:
    if not is_address(config.http_address):
        raise ConfigError(
            f"{name('agent.http_address')}: {config.http_address[:60]!r} is not an IP address; use "
            "127.0.0.1, or 0.0.0.0 for every interface"
        )
    _check_pair("agent.http_", config.http_cert_file, config.http_key_file, name)


def _check_pair(section: str, certificate: str, key: str, name: Name) -> None:
    if bool(certificate) != bool(key):
        given, other = ("cert", "key") if certificate else ("key", "cert")
        raise ConfigError(
            f"{name(f'{section}{given}_file')}: set without {section}{other}_file; set both or "
            "neither"
        )


def _check_certificate_login(config: MinioConfig, name: Name) -> None:
    if not config.certificate_login:
        return
    login = name("minio.certificate_login")
    if not config.cert_file:
        raise ConfigError(f"{login}: needs minio.cert_file and minio.key_file; set them too")
    if config.access_key or config.credentials_file:
        other = "credentials_file" if config.credentials_file else "access_key"
        raise ConfigError(f"{login}: cannot be combined with minio.{other}; remove one of them")
    if any(url.startswith("http:") for url in endpoint_urls(config)):
        raise ConfigError(
            f"{login}: needs https, but {name('minio.endpoint')} has an http URL; use https"
        )


def _check_sse(config: MinioConfig, name: Name) -> None:
    if (config.sse == "kms") != bool(config.sse_kms_key):
        raise ConfigError(
            f"{name('minio.sse_kms_key')}: only valid with {name('minio.sse')} = kms; set both or "
            "neither"
        )
    if not _KMS_KEY.fullmatch(config.sse_kms_key):
        raise ConfigError(
            f"{name('minio.sse_kms_key')}: {config.sse_kms_key[:60]!r} is not a key name; use "
            "letters, digits and _-./:"
        )
    if config.sse == "kms" and any(url.startswith("http:") for url in endpoint_urls(config)):
        raise ConfigError(
            f"{name('minio.sse')}: kms needs https, but {name('minio.endpoint')} has an http "
            "URL; use https or SSE-S3"
        )


def is_address(host: str) -> bool:
    """Return whether a host is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
