"""The versions of SGLang that this project supports."""

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ("0.5.22", "0.5.23")
"""Supported versions, oldest first. `make test-sglang VERSION=...` tests with one of them."""

RUN_END_TO_END = ("0.5.23",)
"""Versions whose servers have passed the end-to-end tests. Servers of others log a warning."""

NEWEST = SUPPORTED[-1]


def installed() -> str:
    """Return the version of the installed SGLang."""
    try:
        return version("sglang")
    except PackageNotFoundError:  # SGLang runs from its sources
        return "of unknown version"


def refusal(found: str) -> str:
    """Return one line that tells users why the tier cannot run in this SGLang."""
    return f"SGLang {installed()} is not supported: {found}; install sglang=={NEWEST}"
