"""Compile SGLang's page-hash extension now, instead of in the first request."""

import sys
import time


def main() -> int:
    """Compile the extension into PyTorch's cache of extensions, or say that there is a fallback."""
    from sglang.srt.mem_cache.cpp_utils.native_hash import _load_native_hash_module

    begin = time.monotonic()
    try:
        module = _load_native_hash_module()
    except RuntimeError as error:
        print(
            f"page-hash extension: cannot be built ({error.__cause__ or error}); "
            "hashlib computes the same hashes more slowly"
        )
        return 0
    print(f"page-hash extension: {module.__file__} ({time.monotonic() - begin:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
