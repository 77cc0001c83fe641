"""AWS Signature Version 4 for requests without query and with an unsigned body.

Gives what `minio.signer.sign_v4_s3` gives, byte for byte (a test compares them), at a fifth of its
cost: that one derives the day's key for each request and puts every header through a regular
expression, which adds some 2 % to the time of a 1 MiB page.
"""

import hashlib
import hmac
import time
from collections.abc import Mapping
from functools import lru_cache

ALGORITHM = "AWS4-HMAC-SHA256"

UNSIGNED = "UNSIGNED-PAYLOAD"
"""Stands for the body's hash; pages have a checksum of their own, and TLS where secrecy matters."""


def authorization(
    method: str,
    path: str,
    fields: Mapping[str, str],
    *,
    access_key: str,
    secret_key: str,
    region: str,
    date: str,
) -> str:
    """Return the value of the `Authorization` field.

    `path` is quoted; `fields` are signed, by lower-case name and without spaces that a server would
    fold; `date` is their `x-amz-date`.
    """
    names = sorted(fields)
    canonical_fields = "".join([f"{name}:{fields[name]}\n" for name in names])
    signed = ";".join(names)
    request = f"{method}\n{path}\n\n{canonical_fields}\n{signed}\n{UNSIGNED}"
    scope = f"{date[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256(request.encode()).hexdigest()
    text = f"{ALGORITHM}\n{date}\n{scope}\n{digest}"
    key = _signing_key(secret_key, date[:8], region)
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    return (
        f"{ALGORITHM} Credential={access_key}/{scope}, SignedHeaders={signed}, "
        f"Signature={signature}"
    )


def request_date() -> str:
    """Return the time as `x-amz-date` wants it."""
    return _date(int(time.time()))


@lru_cache(maxsize=2)
def _date(second: int) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second))


@lru_cache(maxsize=8)
def _signing_key(secret_key: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret_key}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key
