"""The versions of SGLang that this project supports."""

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ("0.5.22", "0.5.23")
"""Oldest first. The end-to-end tests pass with each of them: `make test-sglang VERSION=...`."""

NEWEST = SUPPORTED[-1]


def installed() -> str:
    """Return the version of the installed SGLang."""
    try:
        return version("sglang")
    except PackageNotFoundError:  # run from its sources
        return "of unknown version"


def refusal(found: str) -> str:
    """Return one line for users of an SGLang that the tier cannot run in; `found` says why."""
    return f"SGLang {installed()} is not supported: {found}; install sglang=={NEWEST}"
