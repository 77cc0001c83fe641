"""The cluster's servers, and how requests address a bucket on them."""

from typing import NamedTuple
from urllib.parse import urlsplit

from memkv_sglang.config.check import endpoint_urls, is_address
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MinioConfig

DEFAULT_PORTS = {"http": 80, "https": 443}


class Endpoint(NamedTuple):
    """One server, and how its bucket is addressed."""

    scheme: str
    host: str
    """Name or address to connect to. With virtual-host addressing, it starts with the bucket."""
    port: int
    base_path: str
    """Prefix of object names in the request target: `/`, or `/bucket/` with path addressing."""

    @property
    def netloc(self) -> str:
        """Value of the `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """URL of the server, for messages."""
        return f"{self.scheme}://{self.netloc}"


def parse_endpoints(config: MinioConfig) -> list[Endpoint]:
    """Return the configured endpoints, in order. Raises `ConfigError`."""
    return [_parse(url, config) for url in endpoint_urls(config)]


def _parse(url: str, config: MinioConfig) -> Endpoint:
    parts = urlsplit(url)
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise ConfigError(f"minio.endpoint: {url!r} is not a URL like http://minio:9000")
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    if config.addressing == "path":
        return Endpoint(parts.scheme, parts.hostname, port, f"/{config.bucket}/")
    if is_address(parts.hostname):
        raise ConfigError(
            f"minio.addressing: `virtual` needs a host name in minio.endpoint, not the address "
            f"{parts.hostname}; use a name or `path`"
        )
    return Endpoint(parts.scheme, f"{config.bucket}.{parts.hostname}", port, "/")
