"""Prefill/decode disaggregation over Mooncake's TCP transport (`mooncake_tcp`)."""

import ctypes
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PORTS = {"MC_MIN_RPC_PORT": "30000", "MC_MAX_RPC_PORT": "32700"}


def kv_class(result: Any, *_args: Any) -> Any:
    """Wrap `get_kv_class` to keep page indices in plain memory.

    Mooncake's sender copies the indices to pinned memory on a CUDA stream, unless its class says
    that it takes only device tensors.
    """
    if getattr(result, "supports_host_tensor_indices", False):
        result.supports_host_tensor_indices = False
    return result


def environment(directory: Path) -> dict[str, str]:
    """Return variables that a server needs to use Mooncake.

    - Ports that `server.free_port` never returns. Mooncake listens on random ones.
    - Where to find `libibverbs.so.1`, which Mooncake links to. If the system does not have it
      (Debian's `libibverbs1`), it is the one inside the wheel of `nixl`, linked into `directory`.
    """
    return {**PORTS, **_library_path(directory)}


def _library_path(directory: Path) -> dict[str, str]:
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        carried = _carried_libraries()
    else:
        return {}
    if carried is None:
        return {}
    directory.mkdir(parents=True, exist_ok=True)
    link = directory / "libibverbs.so.1"
    if not link.is_symlink():
        link.symlink_to(next(carried.glob("libibverbs-*")))
    given = os.environ.get("LD_LIBRARY_PATH", "")
    return {"LD_LIBRARY_PATH": ":".join([str(directory), str(carried), *filter(None, [given])])}


def _carried_libraries() -> Path | None:
    for name in ("nixl_cu12", "nixl_cu13"):
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parents[1] / f"{name}.libs"
            if any(folder.glob("libibverbs-*")):
                return folder
    return None
