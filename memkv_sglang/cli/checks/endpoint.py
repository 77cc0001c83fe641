"""MinIO's servers: whether they answer, and whether their clock agrees with ours."""

import http.client
import time
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

from memkv_sglang.cli.checks.finding import Finding
from memkv_sglang.cli.output import human_time
from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.http.errors import ProtocolError
from memkv_sglang.tiers.minio.http.explain import BODY_LIMIT, misdirected, unreachable
from memkv_sglang.tiers.minio.http.times import SKEW_LIMIT, parse_date
from memkv_sglang.tiers.minio.http.tls import tls_context

ANSWER_LIMIT = 5.0
"""Seconds for a server to answer."""

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
    """Return the answer of the health page."""
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
        body = response.read(BODY_LIMIT)
        date, kind = response.getheader("Date", ""), response.getheader("Content-Type", "")
        return _Answer(response.status, date, kind, body)
    finally:
        connection.close()


def _health(url: str, answer: _Answer, seconds: float) -> Finding:
    if advice := misdirected(answer.status, answer.content_type, answer.body):
        return Finding("FAIL", "MinIO", f"{url}: {advice.problem}", advice.fix)
    if answer.status == http.HTTPStatus.OK:
        return Finding("ok", "MinIO", f"{url} answers in {human_time(seconds)}")
    return Finding(
        "warn",
        "MinIO",
        f"{url} answers, but its health page with status {answer.status}",
        "see the server's log; behind a proxy, let /minio/health/live through",
    )


def _skew(url: str, date: str) -> Finding:
    try:
        skew = abs(time.time() - parse_date(date.encode("latin-1", "replace")))
    except ProtocolError:
        return Finding("warn", "clock", f"{url} tells no time that can be read", "see its proxy")
    advice = "run NTP on both machines"
    if skew >= SKEW_LIMIT:
        detail = f"{human_time(skew)} off {url}: every request will be refused"
        return Finding("FAIL", "clock", detail, advice)
    if skew >= SKEW_WORRYING:
        return Finding("warn", "clock", f"{human_time(skew)} off {url}", advice)
    return Finding("ok", "clock", f"agrees with {url} to {max(1, round(skew))} s")
