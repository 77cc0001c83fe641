"""Make untrusted text safe to print: escape it and limit its length.

Names, notes and reasons come from the bucket, the disk, the network and other clients. Escaping
them all here keeps them from moving the cursor, forging a line or filling the screen.
"""

import json
import math
from typing import Any

LIMIT = 500
"""Maximum characters printed per value."""

LINE_LIMIT = 4000
"""Maximum characters printed per line."""


def printable(value: object, limit: int = LIMIT) -> str:
    r"""Return the value's text on one line.

    Control, format and other invisible characters become `\uXXXX`. If the text is longer than
    `limit`, its middle is omitted.
    """
    return _escape(_shorten(str(value), limit))


def quoted(value: object, limit: int = LIMIT) -> str:
    """Return the value's text as a JSON string on one line, shortened as by `printable`."""
    return _escape(json.dumps(_shorten(str(value), limit), ensure_ascii=False))


def json_text(value: Any) -> str:
    """Return indented JSON, with infinity and NaN as null and invalid UTF-8 escaped."""
    return json.dumps(_valid(value), indent=2, allow_nan=False)


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head, tail = text[: limit * 2 // 3], text[-(limit // 3) :]
    return f"{head}...({len(text) - len(head) - len(tail)} more characters)...{tail}"


def _escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    # As in JSON, a character beyond 16 bits becomes two surrogates. Lone surrogates stay as they
    # are.
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _valid(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_valid(str(name)): _valid(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(item) for item in value]
    return value
