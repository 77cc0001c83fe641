"""Shared KV cache for SGLang: exact prefixes go down to NVMe and MinIO, and come back."""

__version__ = "0.1.0"
