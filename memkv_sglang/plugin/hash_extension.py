"""SGLang's page hashes where its extension cannot be compiled."""

import logging
from collections.abc import Callable
from typing import Any

from memkv_sglang.page_hash import PythonPageHash

log = logging.getLogger(__name__)

_fallback: PythonPageHash | None = None


def load(original: Callable[[], Any]) -> Any:
    """Wrap `_load_native_hash_module`: return the extension, or the same hashes in Python.

    Without this, SGLang answers every lookup with 0 pages and still stores all it computes.
    """
    global _fallback
    if _fallback is None:
        try:
            return original()
        except RuntimeError as error:
            log.warning(
                "memkv: SGLang cannot compile its page hashes (%s), so Python computes them, which "
                "takes three times as long; install g++, ninja and OpenSSL's headers",
                str(error.__cause__ or error).partition("\n")[0],
            )
            _fallback = PythonPageHash()
    return _fallback
