from datetime import UTC, datetime
from urllib.parse import SplitResult, quote

from hypothesis import given
from hypothesis import strategies as st
from minio.credentials import Credentials  # type: ignore[attr-defined]  # missing from its __all__
from minio.signer import sign_v4_s3

from memkv_sglang.tiers.minio.sigv4 import UNSIGNED, authorization, request_date

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
    ours = authorization(
        method, path, fields, access_key=keys[0], secret_key=keys[1], region=region, date=date
    )
    assert ours == theirs["Authorization"]


def test_date_is_now() -> None:
    date = datetime.strptime(request_date() + "+0000", "%Y%m%dT%H%M%SZ%z")
    assert abs((datetime.now(UTC) - date).total_seconds()) < 60
