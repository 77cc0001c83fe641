"""Compare what this project uses of SGLang between two versions, without importing SGLang.

`make sglang-diff VERSION=X` downloads both wheels and prints every hooked or used function, class
and attribute that changed since the newest supported version, new server arguments, and patched
files that changed. Read docs/sglang-storage.md, "Assess a new release".
"""
