from datetime import UTC, datetime
from urllib.parse import SplitResult, quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from minio.credentials import Credentials  # type: ignore[attr-defined]  # missing from its __all__
from minio.signer import sign_v4_s3

from memkv_sglang.tiers.minio.auth import signing
from memkv_sglang.tiers.minio.auth.credentials import StaticKeys
from memkv_sglang.tiers.minio.auth.signing import Signer
from memkv_sglang.tiers.minio.auth.sigv4 import UNSIGNED, request_date, template
from memkv_sglang.tiers.minio.http.endpoints import Endpoint

WORDS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=30)


@given(
    method=st.sampled_from(["GET", "PUT", "HEAD", "DELETE"]),
    name=st.text(min_size=1, max_size=60),
    extra=st.dictionaries(WORDS.map("x-amz-meta-{}".format), WORDS),
    keys=st.tuples(WORDS, WORDS),
    region=WORDS,
    time=st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)),
)
def test_signature_is_that_of_minio_py(
    method: str,
    name: str,
    extra: dict[str, str],
    keys: tuple[str, str],
    region: str,
    time: datetime,
) -> None:
    time = time.replace(tzinfo=UTC, microsecond=0)
    date = f"{time:%Y%m%dT%H%M%SZ}"
    path = "/bucket/" + quote(name, errors="replace")
    fields = {"host": "h:1", "x-amz-content-sha256": UNSIGNED, "x-amz-date": date, **extra}
    theirs = sign_v4_s3(
        method=method,
        url=SplitResult("http", "h:1", path, "", ""),
        region=region,
        headers=dict(fields),
        credentials=Credentials(*keys),
        content_sha256=UNSIGNED,
        date=time,
    )
    ours = template(
        method,
        fields,
        access_key=keys[0],
        secret_key=keys[1],
        region=region,
        date=date,
        unsigned="user-agent: x\r\n",
    ).head(path)
    sent = {**fields, "user-agent": "x", "authorization": theirs["Authorization"]}
    lines = "".join(f"{field}: {value}\r\n" for field, value in sent.items())
    assert ours.decode() == f"{method} {path} HTTP/1.1\r\n{lines}\r\n"


class TokenKeys(StaticKeys):
    def retrieve(self) -> Credentials:
        return Credentials("key", "secret", "token")


def test_no_head_is_signed_for_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Endpoint("http", "one", 80, "/b/"), Endpoint("http", "two", 80, "/b/")
    first, second = StaticKeys("key", "secret"), StaticKeys("key", "another secret")
    signer = Signer(first, "region")
    requests = [
        (keys, date, method, endpoint, path, fields)
        for path in ("/b/x", "/b/y")
        for date in ("20261125T000000Z", "20261125T000001Z", "20261126T000000Z")
        for keys in (first, second, TokenKeys("key", "secret"), first)
        for method in ("GET", "HEAD")
        for endpoint in (one, two)
        for fields in ({}, {"content-length": "0"}, {})
    ]
    for keys, date, method, endpoint, path, fields in requests:
        monkeypatch.setattr(signing, "request_date", lambda date=date: date)
        fresh = Signer(keys, "region")
        request = (keys.retrieve(), method, endpoint, path, fields)
        assert signer.head(*request) == fresh.head(*request)


def test_date_is_now() -> None:
    date = datetime.strptime(request_date() + "+0000", "%Y%m%dT%H%M%SZ%z")
    assert abs((datetime.now(UTC) - date).total_seconds()) < 60
