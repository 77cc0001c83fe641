"""Explain what went wrong between this node and MinIO, and which setting fixes it.

This covers the error codes of S3 and MinIO, HTTP statuses without a code, and failed connections.
All texts have the form of a `ConfigError`: `problem; fix`.
"""

import errno
import http.client
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from memkv_sglang.tiers.minio.http.errors import ProtocolError, StatusError, TransferError
from memkv_sglang.tiers.minio.http.framing import ResponseHead
from memkv_sglang.tiers.minio.http.times import parse_date

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

BODY_LIMIT = 16 << 10
"""Maximum bytes of an error's body that are examined."""

Field = Callable[[str], str | None]
"""Returns the value of a response's header field."""


class Advice(NamedTuple):
    """A problem and its fix, as one line for the user."""

    problem: str
    fix: str

    def __str__(self) -> str:
        """Return the text in the form of a `ConfigError`."""
        return f"{self.problem}; {self.fix}"


_REGION = Advice(
    "requests are signed for the wrong region", "set minio.region to {region}, as the server says"
)
_REGION_UNKNOWN = Advice(
    "requests are signed for the wrong region", "set minio.region to the bucket's region"
)
_PERHAPS_REGION = Advice(
    "the server refused the request without a reason",
    "set minio.region to {region} if it is another one, else look at the server's log",
)
_ELSEWHERE = Advice(
    "the bucket is on another endpoint", "set minio.endpoint and minio.region to the bucket's"
)
_DENIED = Advice(
    "this access key may not do this",
    "allow {permission} on minio.bucket for it; `memkv bucket policy` prints the whole policy",
)
_KEY = Advice(
    "the server does not know this access key",
    "correct minio.access_key and minio.secret_key, or minio.credentials_file",
)
_SECRET = Advice(
    "the secret key does not match the access key",
    "correct minio.secret_key or minio.credentials_file; a proxy must keep the Host header",
)
_CLOCK = Advice("this node's clock is {skew}", "run NTP on both machines")
_TOKEN = Advice(
    "the session token has expired or is not valid",
    "put new credentials into minio.credentials_file",
)
_FULL = Advice("the server's drives are full", "add drives, or set collector.capacity")
_QUOTA = Advice(
    "the bucket's quota is used up",
    "raise it (`mc quota set`), or set collector.capacity below it",
)
_BUSY = Advice(
    "the server is overloaded, starting or short of drives",
    "look at its log; lower minio.connections if this goes on",
)
_UNSUPPORTED = Advice(
    "the server does not support this request",
    "point minio.endpoint to an S3 API port; see the server's log",
)
_BUCKET_NAME = Advice("the server refuses the bucket's name", "correct minio.bucket")
_BUCKET_TAKEN = Advice("another account owns the bucket", "choose another minio.bucket")
_KMS = Advice(
    "the server cannot encrypt as asked", "configure its KMS, or correct minio.sse and sse_kms_key"
)
_LOCKED = Advice(
    "the object is locked or archived", "use a bucket without object lock in minio.bucket"
)
_PROXY_LIMIT = Advice(
    "a proxy refuses requests of a page's size",
    "raise its body limit (nginx: client_max_body_size 0), or point minio.endpoint past it",
)
_GATEWAY = Advice(
    "a proxy in front of the server cannot reach it", "start MinIO, or correct the proxy"
)
_NOT_S3 = "set minio.endpoint to the S3 API port (9000 by default), and look for a proxy in between"
_HTML_REFUSAL = Advice(
    "a proxy's error page came back",
    "write https:// in minio.endpoint if its port speaks TLS, else set it to the S3 API port",
)
_HTML = Advice(
    "an HTML page came back: this is MinIO's console or a proxy, not the S3 API",
    "set minio.endpoint to the S3 API port (9000 by default)",
)
_REDIRECT = Advice(
    "the server redirects elsewhere, which is not followed",
    "set minio.endpoint to the URL of the S3 API itself",
)
_TLS_PORT = Advice("the port speaks TLS", "write https:// in minio.endpoint")
_NO_BUCKET = Advice(
    "the bucket does not exist",
    "run `memkv bucket setup`, correct minio.bucket, or set minio.create_bucket = true",
)
_NOT_FOUND = Advice("not found", "correct minio.endpoint and minio.bucket")
_UNKNOWN = Advice("the server refused the request", "look at the server's log")

BY_CODE = {
    "AuthorizationHeaderMalformed": _REGION,
    "AuthorizationQueryParametersError": _REGION,
    "InvalidRegion": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "InvalidLocationConstraint": _REGION,
    "PermanentRedirect": _ELSEWHERE,
    "TemporaryRedirect": _ELSEWHERE,
    "Redirect": _ELSEWHERE,
    "NoSuchBucket": _NO_BUCKET,
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "InvalidAccessKeyId": _KEY,
    "InvalidClientTokenId": _KEY,
    "SignatureDoesNotMatch": _SECRET,
    "RequestTimeTooSkewed": _CLOCK,
    "ExpiredToken": _TOKEN,
    "ExpiredTokenException": _TOKEN,
    "InvalidToken": _TOKEN,
    "InvalidTokenId": _TOKEN,
    "TokenRefreshRequired": _TOKEN,
    "XMinioStorageFull": _FULL,
    "InsufficientStorage": _FULL,
    "XMinioAdminBucketQuotaExceeded": _QUOTA,
    "QuotaExceeded": _QUOTA,
    "SlowDown": _BUSY,
    "SlowDownRead": _BUSY,
    "SlowDownWrite": _BUSY,
    "ServiceUnavailable": _BUSY,
    "ServerBusy": _BUSY,
    "TooManyRequests": _BUSY,
    "RequestTimeout": _BUSY,
    "InternalError": _BUSY,
    "XMinioServerNotInitialized": _BUSY,
    "XMinioBackendDown": _BUSY,
    "MethodNotAllowed": _UNSUPPORTED,
    "NotImplemented": _UNSUPPORTED,
    "InvalidBucketName": _BUCKET_NAME,
    "BucketAlreadyExists": _BUCKET_TAKEN,
    "KMSNotConfigured": _KMS,
    "InvalidEncryptionAlgorithmError": _KMS,
    "KMS.NotFoundException": _KMS,
    "KMS.DisabledException": _KMS,
    "ObjectLocked": _LOCKED,
    "InvalidObjectState": _LOCKED,
    "EntityTooLarge": _PROXY_LIMIT,
}
"""Advice by the `<Code>` of S3's error documents."""

BY_STATUS = {
    401: _KEY,
    403: _DENIED,
    404: _NOT_FOUND,
    405: _UNSUPPORTED,
    407: Advice("a proxy asks for a login", "point minio.endpoint past the proxy"),
    413: _PROXY_LIMIT,
    429: _BUSY,
    500: _BUSY,
    501: _UNSUPPORTED,
    502: _GATEWAY,
    503: _BUSY,
    504: _GATEWAY,
    507: _FULL,
}

_CANONICAL = {code.lower(): code for code in BY_CODE}

_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")
_REGION_TAG = re.compile(rb"<Region>([A-Za-z0-9-]{1,64})</Region>")
_EXPECTED = re.compile(r"expecting '([A-Za-z0-9-]{1,64})'")
_WORD = re.compile(r"[A-Za-z0-9.-]{1,64}")

PERMISSIONS = {
    "GET": "s3:GetObject",
    "HEAD": "s3:GetObject and s3:ListBucket",
    "PUT": "s3:PutObject",
    "DELETE": "s3:DeleteObject",
    "look for the bucket": "s3:ListBucket",
    "make the bucket": "s3:CreateBucket",
    "list objects": "s3:ListBucket",
    "read an object": "s3:GetObject",
    "write an object": "s3:PutObject",
    "remove objects": "s3:DeleteObject",
    "read the bucket's versioning": "s3:GetBucketVersioning",
}
"""The required permission, by HTTP method (data path) or operation (control path)."""


def refusal(
    status: int,
    field: Field,
    body: bytes,
    permission: str,
    *,
    code: str = "",
    retry_after: float = 0.0,
) -> StatusError:
    """Return the error for a refused request, which needed `permission`.

    `field` looks up header fields. `code` is used if the response names no code. The response is
    not trusted: text that does not look like a code, a region or a date is ignored.
    """
    body = body[:BODY_LIMIT]
    found = _CODE.search(body)
    code = found[1].decode() if found else _word(field("x-minio-error-code")) or code
    code = _CANONICAL.get(code.lower(), code)
    advice = _advice(status, code, field, body)
    text = advice.fix
    if advice is _REGION:
        region = _region(field, body)
        advice = _REGION if region else _REGION_UNKNOWN
        text = advice.fix.format(region=region)
    elif advice is _PERHAPS_REGION:
        text = advice.fix.format(region=_region(field, body))
    elif advice is _ELSEWHERE and (region := _region(field, body)):
        text = f"{advice.fix}: the server names {region}"
    problem = advice.problem.format(skew=_skew(field))
    reason = Advice(problem, text.format(permission=permission or "this"))
    name = f"{code} (HTTP {status})" if code else f"HTTP status {status}"
    return StatusError(status, code, retry_after, f"{name}: {reason}")


def refused(head: ResponseHead, body: bytes, method: str) -> StatusError:
    """Return the error for a refused request of the data path."""
    return refusal(
        head.status,
        partial(_field_of, head),
        body,
        PERMISSIONS.get(method, ""),
        retry_after=head.retry_after,
    )


def control_error(url: str, error: BaseException, permission: str) -> str:
    """Explain in one line what minio-py, urllib3 or a socket raised on the control path."""
    from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

    for cause in _causes(error):
        if isinstance(cause, S3Error):
            answer = cause.response
            code = cause.code if cause.code in BY_CODE else ""
            return str(
                refusal(answer.status, answer.headers.get, _data(answer), permission, code=code)
            )
        if isinstance(cause, InvalidResponseError):
            status, kind, body = cause._code, cause._content_type, cause._body or ""

            def field(name: str, kind: str | None = kind) -> str | None:
                return kind if name == "content-type" else None

            return str(refusal(status, field, body.encode(), permission))
        if isinstance(cause, ServerError):
            return str(refusal(cause.status_code, lambda _: None, b"", permission))
    # `ControlHttp` raises this
    malformed = any(type(cause) is ValueError for cause in _causes(error))
    if malformed or isinstance(error, MinioException | ValueError | SyntaxError):
        problem = f"{url} sent an answer that is not S3's ({_short(error)})"
        return str(Advice(problem, _NOT_S3))
    return str(unreachable(url, error))


def _data(answer: "BaseHTTPResponse") -> bytes:
    try:
        return answer.data or b""
    except Exception:  # the body is incomplete
        return b""


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:100]}"


def _field_of(head: ResponseHead, name: str) -> str | None:
    try:
        value = head.field(name.encode())
    except ProtocolError:  # the field is repeated
        return None
    return value.decode("latin-1") if value else None


def is_html(head: ResponseHead) -> bool:
    """Return whether a response is a web page, which object stores do not send."""
    return b"\r\ncontent-type: text/html" in head.lower


def unusable_answer(head: ResponseHead) -> TransferError:
    """Return the error for a response that lacks a page's metadata."""
    if is_html(head):
        return ProtocolError(*_HTML)
    kind = ascii(_field_of(head, "content-type") or "no content type")[1:60]
    return ProtocolError(
        f"HTTP status {head.status} without a page's metadata ({kind})",
        "look for a proxy that answers for MinIO, and at who writes to the bucket",
    )


_SENT_BY_PROXIES = frozenset({413, 429, 502, 503, 504})
"""Statuses that proxies in front of an S3 server send as an HTML page."""


def misdirected(status: int, content_type: str, body: bytes) -> Advice | None:
    """Return advice for a response that cannot come from an S3 API; None if it can."""
    if status == 400 and (b"HTTPS server" in body or b"HTTPS port" in body):
        return _TLS_PORT
    if content_type.lower().startswith("text/html") and status not in _SENT_BY_PROXIES:
        return _HTML_REFUSAL if status == 400 else _HTML
    return None


def unreachable(url: str, error: BaseException) -> Advice:
    """Explain why a connection could not be opened or was lost."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _certificate(url, cause)
        if isinstance(cause, ssl.SSLError):
            return _tls(url, cause)
    for cause in chain:
        if isinstance(cause, socket.gaierror):
            fix = "correct the host in minio.endpoint, or this machine's DNS"
            return Advice(f"{url} does not answer: {cause.strerror}", fix)
        if isinstance(cause, TimeoutError):
            fix = "start MinIO, let its port through the firewall, or correct minio.endpoint"
            return Advice(f"{url} does not answer: timed out", fix)
        if isinstance(cause, http.client.BadStatusLine) and not isinstance(cause, ConnectionError):
            fix = "write https:// in minio.endpoint if the port speaks TLS, or correct the port"
            return Advice(f"{url} does not answer in HTTP", fix)
    last = next((cause for cause in chain if isinstance(cause, OSError)), error)
    reason = getattr(last, "strerror", None) or str(last) or type(last).__name__
    number = getattr(last, "errno", None)
    fix = "start MinIO, let its port through, or correct minio.endpoint"
    if number == errno.ECONNREFUSED:
        reason, fix = os.strerror(number), "start MinIO, or correct the port in minio.endpoint"
    elif url.startswith("https:") and isinstance(last, ConnectionError):
        fix = "look at its log; if it asks for a client certificate, set minio.cert_file"
    return Advice(f"{url} does not answer: {reason}", fix)


def _advice(status: int, code: str, field: Field, body: bytes) -> Advice:
    if code in BY_CODE:
        return BY_CODE[code]
    if wrong := misdirected(status, field("content-type") or "", body):
        return wrong
    if status == 400 and field("date") is None:
        return _TLS_PORT  # Go's servers send nothing else
    if status in (301, 302, 303, 307, 308):
        return _ELSEWHERE if _region(field, body) else _REDIRECT
    if status == 400 and _region(field, body):
        return _PERHAPS_REGION
    return BY_STATUS.get(status, _UNKNOWN)


def _region(field: Field, body: bytes) -> str:
    """Return the region that the response names; empty if it names none."""
    if found := _REGION_TAG.search(body):
        return found[1].decode()
    if region := _word(field("x-amz-bucket-region")):
        return region
    text = body.decode("latin-1").replace("&#39;", "'") + (field("x-minio-error-desc") or "")
    expected = _EXPECTED.search(text)
    return expected[1] if expected else ""


def _word(value: str | None) -> str:
    return value if value and _WORD.fullmatch(value) else ""


def _skew(field: Field) -> str:
    try:
        ahead = time.time() - parse_date((field("date") or "").encode("latin-1", "replace"))
    except ProtocolError:
        return "not the server's"
    return f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes. urllib3 keeps causes in `reason` and in arguments."""
    waiting, seen = [error], set[int]()
    while waiting and len(seen) < 20:
        cause = waiting.pop(0)
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        inner = (getattr(cause, "reason", None), cause.__cause__, cause.__context__, *cause.args)
        waiting += [item for item in inner if isinstance(item, BaseException)]


_HOSTNAME_MISMATCH = (62, 64)
_OUT_OF_DATE = (9, 10)
_NOT_STRICT = range(79, 94)
"""OpenSSL's errors with `VERIFY_X509_STRICT`, which Python 3.13 sets: 85 for a certificate without
its issuer's key identifier, 92 for an authority without a key usage."""


def _certificate(url: str, error: ssl.SSLCertVerificationError) -> Advice:
    message = getattr(error, "verify_message", "") or str(error)
    problem = f"{url}: certificate verify failed: {message}"
    code = getattr(error, "verify_code", 0)
    if code in _HOSTNAME_MISMATCH:
        return Advice(problem, "write a name of the server's certificate in minio.endpoint")
    if code in _OUT_OF_DATE:
        return Advice(problem, "renew the server's certificate, and check this node's clock")
    if code in _NOT_STRICT:
        return Advice(problem, "reissue the certificates as in docs/troubleshooting.md")
    return Advice(problem, "set minio.ca_file to the PEM file of the authority that signed it")


def _tls(url: str, error: ssl.SSLError) -> Advice:
    reason = error.reason or str(error)
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return Advice(
            f"{url} does not speak TLS (ssl: {reason})", "write http:// in minio.endpoint"
        )
    problem = f"{url}: TLS failed (ssl: {reason})"
    if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason:
        fix = "set minio.cert_file and minio.key_file to a certificate that the server accepts"
        return Advice(problem, fix)
    return Advice(problem, "compare the TLS versions and certificates of both sides")
