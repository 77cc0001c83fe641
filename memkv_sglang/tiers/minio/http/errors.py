"""What can go wrong on the way to a server and back. No text ever holds a secret."""

LOOK_FOR_PROXY = "check that minio.endpoint is an S3 API port, and look for a proxy in between"


class TransferError(Exception):
    """A request was not answered as it should be; its connection is of no more use."""


class OutOfTimeError(TransferError):
    """The call's deadline came first."""


class StallError(TransferError):
    """The server took or sent nothing for the stall timeout."""

    def __init__(self, seconds: float) -> None:
        """Name the timeout."""
        super().__init__(
            f"nothing moved for {seconds:g} s; look at the server's load and the network, or raise "
            "minio.stall_timeout"
        )


class ConnectError(TransferError):
    """No connection could be opened."""


class ClosedError(TransferError):
    """The server closed the connection."""


class StaleError(ClosedError):
    """A kept-alive connection was closed, or stayed silent, before a byte of the response came.

    A balancer may have forgotten it; the server is not at fault. Retry on a fresh connection.
    """


class ProtocolError(TransferError):
    """The response is not one that this client understands."""

    def __init__(self, problem: str, fix: str = "") -> None:
        """Name the problem, and what to do about it if that is special."""
        super().__init__(f"{problem}; {fix or LOOK_FOR_PROXY}")


class UnreadableError(TransferError):
    """The object may be right, but is not for this node to read."""


class StatusError(Exception):
    """The server answered, but not with what was asked for."""

    def __init__(
        self, status: int, code: str = "", retry_after: float = 0.0, text: str = ""
    ) -> None:
        """Describe itself by `text`, see `explain`.

        `retry_after`: seconds for which the server asked to be left alone.
        """
        super().__init__(text or f"HTTP status {status}" + (f" ({code})" if code else ""))
        self.status = status
        self.code = code
        self.retry_after = retry_after
