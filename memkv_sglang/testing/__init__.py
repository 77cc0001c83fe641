"""Conformance tests for tiers, here and in other projects. Needs the `testing` extra."""

from importlib.util import find_spec

_MISSING = [name for name in ("hypothesis", "pytest") if find_spec(name) is None]
if _MISSING:
    raise ModuleNotFoundError(
        f"memkv_sglang.testing needs {' and '.join(_MISSING)}: "
        "run pip install 'sglang-memkv[testing]'"
    )
