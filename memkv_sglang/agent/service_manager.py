"""Tell systemd about the agent's state: sd_notify(3).

systemd names its socket in `$NOTIFY_SOCKET` and the watchdog's limit in `$WATCHDOG_USEC`. Without
them, every call is a no-op. Only an agent in the foreground reports: an agent that a server started
would otherwise report to the server's own unit.
"""

import logging
import os
import socket
from collections.abc import MutableMapping

log = logging.getLogger(__name__)

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class ServiceManager:
    """The service manager that started this process, if any. Calls do not block."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Remove systemd's variables from `environ`, so that child processes do not report."""
        address, limit, _ = (environ.pop(name, "") for name in _VARIABLES)
        # A leading @ stands for the zero byte of an abstract name.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        is_watched = bool(address) and limit.isdigit()
        self.watchdog = int(limit) / 1e6 if is_watched else 0.0
        """Maximum seconds between two calls of `alive` before systemd restarts the agent; 0 if
        there is no limit."""

    @property
    def is_present(self) -> bool:
        """Whether a service manager started this process."""
        return bool(self._address)

    def ready(self) -> None:
        """Report that the agent serves clients."""
        self._send("READY=1")

    def alive(self) -> None:
        """Tell the watchdog that the agent is alive."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows."""
        self._send(f"STATUS={' '.join(text.split())}")

    def stopping(self, seconds: float) -> None:
        """Report that the agent is stopping, which may take `seconds`."""
        self._send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            try:
                sock.sendto(os.fsencode(message), self._address)
            except OSError as error:
                fields = {"message": message, "reason": str(error)}
                log.warning("service manager not notified", extra={"fields": fields})
