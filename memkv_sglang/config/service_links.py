"""Recognize variables that Kubernetes sets for services whose names begin with `memkv`.

For a service `memkv-minio`, every pod of its namespace gets `MEMKV_MINIO_SERVICE_HOST`,
`MEMKV_MINIO_PORT=tcp://10.0.0.1:9000`, `MEMKV_MINIO_PORT_9000_TCP_ADDR` and so on. They look like
settings but are not.
"""

import re
from collections.abc import Sequence

_NAME = re.compile(
    r"MEMKV(_[A-Z0-9_]+)?"
    r"(_SERVICE_HOST|_SERVICE_PORT(_[A-Z0-9_]+)?"
    r"|_PORT_[0-9]{1,5}_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?)"
)
_URL_NAME = re.compile(r"MEMKV(_[A-Z0-9_]+)?_PORT")
_URL = re.compile(r"(tcp|udp|sctp)://[0-9A-Za-z.:\[\]-]+:[0-9]{1,5}")


def is_service_link(variable: str, value: str) -> bool:
    """Return whether Kubernetes set the variable.

    `MEMKV_..._PORT` may also be a setting (`agent.http_port`) or a typo, so this looks at its
    value.
    """
    if _NAME.fullmatch(variable):
        return True
    return bool(_URL_NAME.fullmatch(variable) and _URL.fullmatch(value))


def service_links_note(variables: Sequence[str]) -> str:
    """Return a line that says which variables were ignored."""
    others = f" and {len(variables) - 1} more" if len(variables) > 1 else ""
    return (
        f"ignored {variables[0]}{others}: Kubernetes sets them for services; "
        "set enableServiceLinks: false in the pod spec to remove them"
    )
