"""A shared KV cache for SGLang. Pages spill to NVMe and MinIO, and load back by exact prefix.

This module exports what another engine needs to use the tiers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memkv_sglang.client.client import AgentClient
    from memkv_sglang.config.load import load_config
    from memkv_sglang.namespace import Namespace
    from memkv_sglang.page import Buffer, Chain
    from memkv_sglang.plugin.storage import MemKVStorage
    from memkv_sglang.tiers.base import LoadResult, SpillResult

__all__ = [
    "AgentClient",
    "Buffer",
    "Chain",
    "LoadResult",
    "MemKVStorage",
    "Namespace",
    "SpillResult",
    "__version__",
    "load_config",
]

__version__ = "0.1.0"

_HOMES = {
    "AgentClient": "client.client",
    "Buffer": "page",
    "Chain": "page",
    "LoadResult": "tiers.base",
    "MemKVStorage": "plugin.storage",
    "Namespace": "namespace",
    "SpillResult": "tiers.base",
    "load_config": "config.load",
}


def __getattr__(name: str) -> Any:
    """Import an exported name on first use, because the storage class needs SGLang."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
