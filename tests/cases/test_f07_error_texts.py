"""Every MinIO error that a user can cause leads to one line that names the setting and the fix."""

import http.server
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import msgspec
import pytest
from memkv_testbed.certificates import Authority
from memkv_testbed.http_proxy import HttpFault, HttpFaultProxy
from memkv_testbed.minio_server import MinioServer
from memkv_testbed.minio_users import Keys
from memkv_testbed.s3_server import free_port

from memkv_sglang.cli.listing.minio import open_bucket
from memkv_sglang.cli.main import main
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.base import LoadResult, SpillResult, TierError
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.admin.policy import node_policy
from tests.cases.minio_tiers import chain_of, load, opened, soon, spill

CHAIN = chain_of(2, "errors")
REGION = "eu-west-7"


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[MinioConfig]:
    """A server in a non-default region, with a bucket."""
    with MinioServer(env={"MINIO_SITE_REGION": REGION}) as server:
        config = MinioConfig(
            endpoint=server.endpoint,
            access_key=server.access_key,
            secret_key=server.secret_key,
            region=REGION,
        )
        with opened(config) as tier:
            spill(tier, CHAIN)
        yield config


@pytest.fixture
def proxy(minio_server: MinioServer) -> Iterator[HttpFaultProxy]:
    with HttpFaultProxy(minio_server.host, minio_server.port) as proxy:
        yield proxy


def changed(config: MinioConfig, **settings: object) -> MinioConfig:
    return msgspec.structs.replace(config, **settings)


Memkv = Callable[..., tuple[int, str]]


@pytest.fixture
def memkv(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Memkv:
    """Run a command on a node with these settings; return its exit status and output."""
    for name in [name for name in os.environ if name.startswith("MEMKV_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "1000")

    def call(config: MinioConfig, *arguments: str) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            for field in ("endpoint", "bucket", "access_key", "secret_key", "region", "ca_file"):
                if value := getattr(config, field):
                    patch.setenv(f"MEMKV_MINIO_{field.upper()}", value)
            patch.setenv("MEMKV_MINIO_CREATE_BUCKET", str(config.create_bucket).lower())
            status = main(arguments)
        return status, "".join(capfd.readouterr())

    return call


VERBS = [
    ("doctor",),
    ("bucket", "setup"),
    ("gc", "--collector-max-age", "30d"),
    ("pins",),
    ("pin", "--chain", "00" * 32),
    ("inspect",),
    ("verify",),
]


def errors_of_the_tier(config: MinioConfig, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Use a tier like an agent does; return what it raises and logs."""
    tier = MinioTier(config)
    try:
        with pytest.raises((TierError, ConfigError)) as raised:
            tier.check(soon())
        limit = soon()
        logged: list[str] = []
        while not logged:  # a call may also end because its time is up
            assert time.monotonic() < limit
            assert LoadResult.LOADED not in load(tier, CHAIN)
            logged = [
                getattr(record, "fields", {}).get("reason", "")
                for record in caplog.records
                if record.message.startswith("minio ")
            ]
        return [str(raised.value), *logged]
    finally:
        tier.close()


def causes(config: MinioConfig, authority: Authority, tmp_path: Path) -> dict[str, Any]:
    return {
        "region": ({"region": "us-east-1"}, f"set minio.region to {REGION}"),
        "key": ({"access_key": "nobody-at-all"}, "minio.access_key"),
        "secret": ({"secret_key": "not-the-secret"}, "minio.secret_key"),
        "bucket": ({"bucket": "another", "create_bucket": False}, "minio.bucket"),
        "refused": ({"endpoint": f"http://127.0.0.1:{free_port()}"}, "minio.endpoint"),
        "name": ({"endpoint": "http://nowhere.invalid:9000"}, "the host in minio.endpoint"),
        "https to http": (
            {"endpoint": config.endpoint.replace("http:", "https:")},
            "write http:// in minio.endpoint",
        ),
    }


CAUSES = ["region", "key", "secret", "bucket", "refused", "name", "https to http"]


@pytest.fixture
def cause(
    request: pytest.FixtureRequest, elsewhere: MinioConfig, tmp_path: Path
) -> tuple[MinioConfig, str]:
    """Wrong settings, and the words that the message must contain."""
    settings, fix = causes(elsewhere, Authority(tmp_path), tmp_path)[request.param]
    return changed(elsewhere, **settings), fix


@pytest.mark.parametrize("cause", CAUSES, indirect=True)
def test_the_tier_names_the_setting(
    cause: tuple[MinioConfig, str], caplog: pytest.LogCaptureFixture
) -> None:
    config, fix = cause
    for text in errors_of_the_tier(config, caplog):
        assert fix in text
        assert "\n" not in text


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize("cause", [c for c in CAUSES if c != "bucket"], indirect=True)
def test_every_verb_names_the_setting(
    cause: tuple[MinioConfig, str], memkv: Memkv, verb: tuple[str, ...]
) -> None:
    config, fix = cause
    status, printed = memkv(config, *verb)
    assert status != 0
    assert fix in printed
    assert "Traceback" not in printed


SERVER_OF_TLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no authority": ("127.0.0.1", {"ca_file": ""}, "minio.ca_file"),
    "another name": ("elsewhere.example", {}, "a name of the server's certificate"),
    "http to https": ("127.0.0.1", {"http": True}, "write https:// in minio.endpoint"),
}


@pytest.mark.parametrize("kind", SERVER_OF_TLS)
def test_mismatched_tls_settings(
    kind: str, tmp_path: Path, memkv: Memkv, caplog: pytest.LogCaptureFixture
) -> None:
    name, settings, fix = SERVER_OF_TLS[kind]
    authority = Authority(tmp_path)
    with MinioServer(certs_dir=authority.issue("certs", [name]).cert_file.parent) as server:
        config = MinioConfig(
            endpoint=server.endpoint,
            ca_file=str(authority.file),
            access_key=server.access_key,
            secret_key=server.secret_key,
        )
        if settings.get("http"):
            config = changed(config, endpoint=server.endpoint.replace("https:", "http:"))
        elif settings:
            config = changed(config, **settings)
        for text in errors_of_the_tier(config, caplog):
            assert fix in text
        for verb in (("doctor",), ("bucket", "setup"), ("inspect",)):
            status, printed = memkv(config, *verb)
            assert (status != 0, fix in printed) == (True, True), (verb, printed)


@pytest.mark.parametrize(
    ("missing", "fix"),
    [
        ("s3:PutObject", "allow s3:PutObject on minio.bucket"),
        ("s3:GetObject", "allow s3:GetObject"),
        ("s3:DeleteObject", "allow s3:DeleteObject on minio.bucket"),
        ("s3:ListBucket", "s3:ListBucket"),
    ],
)
def test_a_denied_request_names_the_permission(
    minio_server: MinioServer,
    minio_config: MinioConfig,
    memkv: Memkv,
    caplog: pytest.LogCaptureFixture,
    missing: str,
    fix: str,
) -> None:
    with opened(minio_config) as tier:
        spill(tier, CHAIN)
    policy = node_policy(minio_config.bucket)
    for statement in policy["Statement"]:
        statement["Action"] = [name for name in statement["Action"] if name != missing]
    policy["Statement"] = [each for each in policy["Statement"] if each["Action"]]
    keys = Keys.random()
    minio_server.users.add(keys, policy)
    config = changed(minio_config, **keys._asdict(), create_bucket=False)
    status, printed = memkv(config, "doctor")
    assert (status, fix in printed) == (1, True), printed
    if missing == "s3:GetObject":
        with pytest.raises(TierError, match=fix), opened(config):
            pass
    if missing == "s3:PutObject":
        with opened(config) as tier:
            load(tier, CHAIN)
            spill(tier, chain_of(1, "new"))
        reasons = [getattr(record, "fields", {}).get("reason", "") for record in caplog.records]
        assert any(fix in reason for reason in reasons), reasons


def document(code: str, more: str = "") -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code>{more}</Error>".encode()


def response(status: int, body: bytes, fields: str = "", kind: str = "application/xml") -> bytes:
    head = (
        f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{fields}Content-Length: {len(body)}\r\n"
        f"Date: {formatdate(time.time() - 1200, usegmt=True)}\r\n\r\n"
    )
    return head.encode() + body


HTML = b"<!doctype html><html><body>MinIO Console</body></html>"

ANSWERS = {
    "RequestTimeTooSkewed": (403, "", "s ahead of the server's; run NTP"),
    "ExpiredToken": (400, "", "minio.credentials_file"),
    "InvalidTokenId": (403, "", "minio.credentials_file"),
    "XMinioStorageFull": (507, "", "collector.capacity"),
    "XMinioAdminBucketQuotaExceeded": (400, "", "mc quota set"),
    "SlowDown": (503, "", "minio.connections"),
    "ServiceUnavailable": (503, "", "minio.connections"),
    "NotImplemented": (501, "", "minio.endpoint"),
    "MethodNotAllowed": (405, "", "minio.endpoint"),
    "PermanentRedirect": (301, "<Region>ap-south-9</Region>", "the server names ap-south-9"),
    "AuthorizationHeaderMalformed": (
        400,
        "<Region>ap-south-9</Region>",
        "minio.region to ap-south-9",
    ),
    "InvalidAccessKeyId": (403, "", "minio.access_key"),
    "SignatureDoesNotMatch": (403, "", "minio.secret_key"),
    "AccessDenied": (403, "", "allow s3:"),
    "NoSuchBucket": (404, "", "minio.bucket"),
    "InternalError": (500, "", "log"),
    "KMSNotConfigured": (400, "", "minio.sse"),
    "SomethingNew": (418, "", "the server's log"),
}


@pytest.mark.parametrize("code", ANSWERS)
def test_every_code_has_a_line_on_both_paths(
    proxy: HttpFaultProxy, minio_config: MinioConfig, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    status, more, fix = ANSWERS[code]
    with opened(minio_config, proxy) as tier:
        spill(tier, CHAIN)
        body = document(code, more)
        proxy.fault = HttpFault(answer=response(status, body))
        bucket = open_bucket(changed(minio_config, endpoint=proxy.url))
        with pytest.raises(TierError) as raised:
            bucket.names("", recursive=True)
        bucket.close()
        assert load(tier, CHAIN)[0] in (LoadResult.FAILED, LoadResult.MISSING)
        proxy.fault = HttpFault(answer=response(status, body))
        assert spill(tier, chain_of(2, "more"))[0] in (SpillResult.FAILED, SpillResult.REFUSED)
    reasons = [getattr(record, "fields", {}).get("reason", "") for record in caplog.records]
    for text in (str(raised.value), next(reason for reason in reasons if code in reason)):
        assert fix in text
        assert f"{code} (HTTP {status})" in text
        assert "; " in text


ODD = {
    "console": (response(200, HTML, kind="text/html; charset=utf-8"), "the S3 API port"),
    "console, not found": (response(404, HTML, kind="text/html"), "the S3 API port"),
    "proxy in front": (response(502, HTML, kind="text/html"), "correct the proxy"),
    "redirect": (response(302, b"", "Location: http://x/\r\n"), "minio.endpoint"),
    "no body": (response(403, b""), "allow s3:"),
    "plain text": (
        response(400, b"Client sent an HTTP request to an HTTPS server.\n", kind="text/plain"),
        "write https://",
    ),
    "plain http to nginx": (
        response(400, b"<html>The plain HTTP request was sent to HTTPS port", kind="text/html"),
        "write https://",
    ),
    "too large": (response(413, HTML, kind="text/html"), "body limit"),
    "proxy login": (response(407, b""), "proxy"),
    "region by a header": (response(400, b"", "x-amz-bucket-region: ap-1\r\n"), "ap-1"),
}


@pytest.mark.parametrize("kind", ODD)
def test_responses_that_are_not_from_s3(
    proxy: HttpFaultProxy,
    minio_config: MinioConfig,
    caplog: pytest.LogCaptureFixture,
    memkv: Memkv,
    kind: str,
) -> None:
    answer, fix = ODD[kind]
    with opened(minio_config, proxy) as tier:
        spill(tier, CHAIN)
        proxy.fault = HttpFault(answer=answer)
        load(tier, CHAIN)
        config = changed(minio_config, endpoint=proxy.url)
        bucket = open_bucket(config)
        with pytest.raises(TierError) as raised:
            # A response to HEAD can be judged only by its fields.
            bucket.ensure() if "header" in kind else bucket.names("", recursive=True)
        bucket.close()
        status, printed = memkv(config, "inspect")
    reasons = [getattr(record, "fields", {}).get("reason", "") for record in caplog.records]
    assert any(fix in reason for reason in reasons), reasons
    assert fix in str(raised.value)
    assert "Traceback" not in printed
    assert status == 1


class Console(http.server.BaseHTTPRequestHandler):
    """Answers every request with a web page, like MinIO's console."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(HTML)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(HTML)

    do_HEAD = do_GET  # noqa: N815 - as http.server wants it

    def log_message(self, *_: object) -> None:
        pass


def test_doctor_knows_the_console_port(minio_config: MinioConfig, memkv: Memkv) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Console)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        config = changed(minio_config, endpoint=f"http://127.0.0.1:{server.server_port}")
        status, printed = memkv(config, "doctor", "--json")
    finally:
        server.shutdown()
        server.server_close()
    failed = [finding for finding in json.loads(printed) if finding["level"] == "FAIL"]
    assert status == 1
    assert re.search("S3 API port", failed[0]["advice"])
