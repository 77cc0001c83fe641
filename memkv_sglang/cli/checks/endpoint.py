"""Check that MinIO's servers respond and that their clocks agree with this machine's."""

import http.client
import time
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

from memkv_sglang.cli.output import human_time
from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.finding import Finding
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.http.errors import ProtocolError
from memkv_sglang.tiers.minio.http.explain import BODY_LIMIT, misdirected, unreachable
from memkv_sglang.tiers.minio.http.times import SKEW_LIMIT, parse_date
from memkv_sglang.tiers.minio.http.tls import tls_context

ANSWER_LIMIT = 5.0
"""Seconds for a server to respond."""

SKEW_WORRYING = 30


def check_endpoints(config: MinioConfig) -> Iterator[Finding]:
    """Check the health and clock of every server. Sends no credentials."""
    for url in endpoint_urls(config):
        yield from _check_endpoint(url, config)


def require_response(config: MinioConfig) -> None:
    """Raise `TierError` with the reasons if no server responds."""
    firsts = [next(_check_endpoint(url, config)) for url in endpoint_urls(config)]
    if all(finding.level == "FAIL" for finding in firsts):
        problems = ", ".join(finding.detail for finding in firsts)
        raise TierError(f"{problems}; {firsts[0].advice}")


def _check_endpoint(url: str, config: MinioConfig) -> Iterator[Finding]:
    begin = time.monotonic()
    try:
        answer = _ask(url, config)
    except (OSError, http.client.HTTPException) as error:
        problem, fix = unreachable(url, error)
        yield Finding("FAIL", "MinIO", problem, fix)
        return
    yield _health(url, answer, time.monotonic() - begin)
    if answer.date:
        yield _skew(url, answer.date)


class _Answer(NamedTuple):
    status: int
    date: str
    content_type: str
    body: bytes


def _ask(url: str, config: MinioConfig) -> _Answer:
    """Return the response of the health page."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    connection: http.client.HTTPConnection
    source = tls_context(config)
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            host, parts.port, timeout=ANSWER_LIMIT, context=source() if source else None
        )
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=ANSWER_LIMIT)
    try:
        connection.request("GET", "/minio/health/live")
        response = connection.getresponse()
        body = response.read(BODY_LIMIT)
        date, kind = response.getheader("Date", ""), response.getheader("Content-Type", "")
        return _Answer(response.status, date, kind, body)
    finally:
        connection.close()


def _health(url: str, answer: _Answer, seconds: float) -> Finding:
    """Judge a response. Any HTTP response means that the server is alive.

    Only MinIO has this page. A web page with status 200 or 400 comes from MinIO's console, or from
    a port that expects TLS.
    """
    advice = misdirected(answer.status, answer.content_type, answer.body)
    if advice and answer.status in (http.HTTPStatus.OK, http.HTTPStatus.BAD_REQUEST):
        return Finding("FAIL", "MinIO", f"{url}: {advice.problem}", advice.fix)
    took = human_time(seconds)
    if answer.status < http.HTTPStatus.INTERNAL_SERVER_ERROR:
        return Finding("ok", "MinIO", f"{url} responded in {took}")
    return Finding(
        "warn",
        "MinIO",
        f"{url} responded in {took}, but its health page returns status {answer.status}",
        "see the server's log, and look for a proxy in between",
    )


def _skew(url: str, date: str) -> Finding:
    try:
        skew = abs(time.time() - parse_date(date.encode("latin-1", "replace")))
    except ProtocolError:
        return Finding("warn", "clock", f"{url} sends no valid date", "check its proxy")
    advice = "run NTP on both machines"
    if skew >= SKEW_LIMIT:
        detail = f"differs from {url} by {human_time(skew)}: every request will be rejected"
        return Finding("FAIL", "clock", detail, advice)
    if skew >= SKEW_WORRYING:
        return Finding("warn", "clock", f"differs from {url} by {human_time(skew)}", advice)
    return Finding("ok", "clock", f"agrees with {url} within {max(1, round(skew))} s")
