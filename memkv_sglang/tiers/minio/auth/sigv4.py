"""AWS Signature Version 4 for requests without query and with an unsigned body.

Gives what `minio.signer.sign_v4_s3` gives, byte for byte (a test compares them), at a tenth of its
cost, a fifth for spills: that one derives the day's key for each request and puts every header
through a regular expression. All but the path can be prepared for many requests.
"""

import hashlib
import hmac
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

ALGORITHM = "AWS4-HMAC-SHA256"

UNSIGNED = "UNSIGNED-PAYLOAD"
"""Stands for the body's hash; pages have a checksum of their own, and TLS where secrecy matters."""


class Template(NamedTuple):
    """A request's head and signature but for what depends on its path."""

    method: str
    canonical: str
    """Canonical request behind the path."""
    text: str
    """String to sign up to the canonical request's hash."""
    key: bytes
    lines: str
    """Header fields up to the signature."""

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
    """Return the template of requests with the same header fields.

    `fields` are signed, by lower-case name and without spaces that a server would fold; `date` is
    their `x-amz-date`. `unsigned`: lines that are sent as well.
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
