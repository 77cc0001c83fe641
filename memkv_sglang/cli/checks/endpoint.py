"""MinIO's servers: whether they answer, and whether their clock agrees with ours."""

import http.client
import ssl
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from memkv_sglang.cli.checks.finding import Finding
from memkv_sglang.cli.output import human_time
from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.tls import tls_context

ANSWER_LIMIT = 5.0
"""Seconds for a server to answer."""

SKEW_REFUSED = 15 * 60
"""Seconds of difference between the clocks at which S3 refuses signatures."""

SKEW_WORRYING = 30


def check_endpoints(config: MinioConfig) -> Iterator[Finding]:
    """Ask every server for its health and the time. Sends no credentials."""
    if not config.endpoint:
        yield Finding("ok", "MinIO", "no MinIO tier is configured")
    for url in endpoint_urls(config):
        yield from _check_endpoint(url, config)


def demand_answer(config: MinioConfig) -> None:
    """Return once a server has answered; raises `TierError` with the reasons if none does."""
    firsts = [next(_check_endpoint(url, config)) for url in endpoint_urls(config)]
    if all(finding.level == "FAIL" for finding in firsts):
        raise TierError(", ".join(finding.detail for finding in firsts))


def _check_endpoint(url: str, config: MinioConfig) -> Iterator[Finding]:
    begin = time.monotonic()
    try:
        status, date = _ask(url, config)
    except ssl.SSLCertVerificationError as error:
        advice = "set minio.ca_file to the authority's PEM file, or correct minio.endpoint"
        yield Finding("FAIL", "MinIO", f"{url}: {error.verify_message}", advice)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        advice = "start MinIO, let its port through, or correct minio.endpoint"
        yield Finding("FAIL", "MinIO", f"{url} does not answer: {reason}", advice)
    else:
        yield _health(url, status, time.monotonic() - begin)
        if date:
            yield _skew(url, date)


def _ask(url: str, config: MinioConfig) -> tuple[int, str]:
    """Return the status of the health page and the `Date` of the answer."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            host, parts.port, timeout=ANSWER_LIMIT, context=tls_context(config)
        )
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=ANSWER_LIMIT)
    try:
        connection.request("GET", "/minio/health/live")
        response = connection.getresponse()
        response.read()
        return response.status, response.getheader("Date", "")
    finally:
        connection.close()


def _health(url: str, status: int, seconds: float) -> Finding:
    if status == http.HTTPStatus.OK:
        return Finding("ok", "MinIO", f"{url} answers in {human_time(seconds)}")
    return Finding(
        "warn",
        "MinIO",
        f"{url} answers, but its health page with status {status}",
        "see the server's log; behind a proxy, let /minio/health/live through",
    )


def _skew(url: str, date: str) -> Finding:
    try:
        skew = abs(time.time() - parsedate_to_datetime(date).timestamp())
    except ValueError:
        return Finding("warn", "clock", f"{url} tells no time that can be read", "see its proxy")
    advice = "run NTP on both machines"
    if skew >= SKEW_REFUSED:
        detail = f"{human_time(skew)} off {url}: every request will be refused"
        return Finding("FAIL", "clock", detail, advice)
    if skew >= SKEW_WORRYING:
        return Finding("warn", "clock", f"{human_time(skew)} off {url}", advice)
    return Finding("ok", "clock", f"agrees with {url} to {max(1, round(skew))} s")
