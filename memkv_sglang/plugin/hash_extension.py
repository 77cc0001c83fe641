"""Provide SGLang's page hashes, even if its extension cannot be compiled."""

import logging

from memkv_sglang.page_hash import PythonPageHash

log = logging.getLogger(__name__)


def load_page_hash() -> None:
    """Compile SGLang's page hashes before a request needs them, or compute them in Python.

    Blocks, possibly for many seconds. SGLang would compile the hashes in its lookup thread, at the
    first lookup. A flush or detach waits 10 s for that thread, and a timeout ends the server. If
    SGLang cannot compile them, it finds 0 pages in every lookup, but still stores all pages.
    """
    from sglang.srt.mem_cache.cpp_utils import native_hash

    try:
        native_hash._load_native_hash_module()
    except Exception as error:
        log.warning(
            "memkv: SGLang cannot compile its page hashes (%s), so Python computes them, which "
            "takes three times as long; install g++, ninja and OpenSSL's headers",
            str(error.__cause__ or error).partition("\n")[0],
        )
        fallback = PythonPageHash()
        native_hash._load_native_hash_module = lambda: fallback
