"""AWS Signature Version 4 for requests without a query and with an unsigned body.

The signatures equal those of `minio.signer.sign_v4_s3`, which a test checks, at a tenth of the cost
(a fifth for spills). minio-py derives the day's key for each request and matches every header with
a regular expression. This module prepares everything but the path once for many requests.
"""

import hashlib
import hmac
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

ALGORITHM = "AWS4-HMAC-SHA256"

UNSIGNED = "UNSIGNED-PAYLOAD"
"""Stands for the hash of the body. It is not needed: pages have their own checksum, and TLS keeps
secrets."""


class Template(NamedTuple):
    """A signed request head without the parts that depend on the path."""

    method: str
    canonical: str
    """The canonical request after the path."""
    text: str
    """The string to sign, up to the hash of the canonical request."""
    key: bytes
    lines: str
    """The header fields, up to the signature."""

    def head(self, path: str) -> bytes:
        """Return the head of a request for a quoted path."""
        request = f"{self.method}\n{path}{self.canonical}".encode()
        text = self.text + hashlib.sha256(request).hexdigest()
        signature = hmac.digest(self.key, text.encode(), "sha256").hex()
        return f"{self.method} {path} HTTP/1.1\r\n{self.lines}{signature}\r\n\r\n".encode()


def template(
    method: str,
    fields: Mapping[str, str],
    *,
    access_key: str,
    secret_key: str,
    region: str,
    date: str,
    unsigned: str = "",
) -> Template:
    """Return a template for requests with the same header fields.

    `fields` are signed. Their names are in lower case, and their values contain no whitespace that
    a server would fold. `date` is their `x-amz-date`. `unsigned` holds additional header lines.
    """
    names = sorted(fields)
    canonical_fields = "".join([f"{name}:{fields[name]}\n" for name in names])
    signed = ";".join(names)
    scope = f"{date[:8]}/{region}/s3/aws4_request"
    lines = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
    return Template(
        method=method,
        canonical=f"\n\n{canonical_fields}\n{signed}\n{UNSIGNED}",
        text=f"{ALGORITHM}\n{date}\n{scope}\n",
        key=_signing_key(secret_key, date[:8], region),
        lines=(
            f"{lines}{unsigned}authorization: {ALGORITHM} Credential={access_key}/{scope}, "
            f"SignedHeaders={signed}, Signature="
        ),
    )


def request_date() -> str:
    """Return the current time in the format of `x-amz-date`."""
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
