"""Describe the format of a pool's KV, which only the device pool knows.

SGLang stores every 8-bit format as `uint8`, on the device and in the host pool, and copies pages to
the host without changing the order of their bytes.
"""

from collections.abc import Sequence
from typing import Any

FACTS = (
    "dtype",
    "store_dtype",
    "kv_cache_layout",
    "kv_cache_dim",
    "dsa_kv_cache_store_fp8",
    "mxfp8_sf_interleaved",
)
"""Attributes of SGLang's device pools (`mem_cache/memory_pool.py`) that say how to interpret the
bytes.
"""


def describe_format(pools: Sequence[Any]) -> str:
    """Return the format of the KV in a device pool and in the draft pools packed into its pages."""
    return "; ".join(map(_describe, pools))


def _describe(pool: Any) -> str:
    if pool is None:  # the pool's buffers belong to the model's anchor pool
        return "none"
    facts = [(name, getattr(pool, name, None)) for name in FACTS]
    quantization = getattr(pool, "quant_method", None)
    facts.append(("quant_method", type(quantization).__name__ if quantization else None))
    named = (f"{name}={value}" for name, value in facts if value is not None)
    return " ".join((type(pool).__name__, *named)).replace("torch.", "")
