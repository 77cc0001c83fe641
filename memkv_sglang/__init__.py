"""Shared KV cache for SGLang: exact prefixes go down to NVMe and MinIO, and come back."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memkv_sglang.plugin.storage import MemKVStorage

__all__ = ["MemKVStorage", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the storage class when it is asked for: it needs SGLang, which the agent does not."""
    if name == "MemKVStorage":
        from memkv_sglang.plugin.storage import MemKVStorage

        return MemKVStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
