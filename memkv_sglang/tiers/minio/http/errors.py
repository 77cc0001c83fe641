"""Errors of requests and responses. Their texts never contain secrets."""

LOOK_FOR_PROXY = "check that minio.endpoint is an S3 API port, and look for a proxy in between"


class TransferError(Exception):
    """A request got no valid response, and its connection cannot be used any more."""


class OutOfTimeError(TransferError):
    """The call's deadline passed."""


class StallError(TransferError):
    """No byte was sent or received for the stall timeout."""

    def __init__(self, seconds: float) -> None:
        """Report the stall timeout, which is in seconds."""
        super().__init__(
            f"nothing moved for {seconds:g} s; look at the server's load and the network, or raise "
            "minio.stall_timeout"
        )


class ConnectError(TransferError):
    """No connection could be opened."""


class ClosedError(TransferError):
    """The server closed the connection."""


class StaleError(ClosedError):
    """A reused connection was closed, or stayed silent, before the first byte of the response.

    A load balancer may have dropped the connection, so the server is not to blame. Retry on a fresh
    connection.
    """


class ProtocolError(TransferError):
    """The response is invalid, or not supported."""

    def __init__(self, problem: str, fix: str = "") -> None:
        """Report a problem. `fix` replaces the usual fix."""
        super().__init__(f"{problem}; {fix or LOOK_FOR_PROXY}")


class UnreadableError(TransferError):
    """The object may be intact, but this node cannot read it."""


class StatusError(Exception):
    """The server refused the request."""

    def __init__(
        self, status: int, code: str = "", retry_after: float = 0.0, text: str = ""
    ) -> None:
        """Report a refusal by `text`; see `explain`.

        `retry_after` is the seconds for which the server asked clients to back off.
        """
        super().__init__(text or f"HTTP status {status}" + (f" ({code})" if code else ""))
        self.status = status
        self.code = code
        self.retry_after = retry_after
