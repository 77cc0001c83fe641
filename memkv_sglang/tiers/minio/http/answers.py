"""Make untrusted text from servers and objects safe to parse and to print."""

import re
from contextlib import suppress
from typing import NoReturn
from xml.parsers import expat

DEPTH_LIMIT = 16
"""Maximum nesting depth of XML. S3's responses have five levels."""

NODE_LIMIT = 64_000
"""Maximum number of XML elements and attributes. A full listing has about 12,000."""

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_REFERENCE = re.compile("&#(x[0-9A-Fa-f]+|[0-9]+);")

REPLACEMENT = "\t"
"""Replaces characters that XML forbids. It sorts before all characters of page names."""


def parseable_xml(content: bytes) -> bytes:
    """Return XML that can be parsed in bounded time and memory. Other content is unchanged.

    Replaces characters that XML forbids, which some servers copy from object names. Raises
    `ValueError` for XML that has a document type, which may define entities, or exceeds the limits
    above. Malformed XML, such as a proxy's web page, passes, and the parser rejects it.
    """
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return content
    text = _CONTROL.sub(REPLACEMENT, content.decode("utf-8", "replace"))
    content = _REFERENCE.sub(_allowed, text).encode()
    _check(content)
    return content


def _allowed(reference: re.Match[str]) -> str:
    digits = reference[1]
    if len(digits) > 8:
        return REPLACEMENT
    code = int(digits[1:], 16) if digits[0] == "x" else int(digits)
    allowed = code in (9, 10, 13) or 32 <= code < 0xD800 or 0xE000 <= code < 0xFFFE
    return reference[0] if allowed or 0x10000 <= code <= 0x10FFFF else REPLACEMENT


def _check(content: bytes) -> None:
    depth = nodes = 0

    def start(_name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, nodes
        depth += 1
        nodes += 1 + len(attributes)
        if depth > DEPTH_LIMIT or nodes > NODE_LIMIT:
            raise ValueError("the server's XML is too deep or too long")

    def end(_name: str) -> None:
        nonlocal depth
        depth -= 1

    def refuse(*_: object) -> NoReturn:
        raise ValueError("the server's XML has a document type")

    parser = expat.ParserCreate("utf-8")
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.StartDoctypeDeclHandler = refuse
    with suppress(expat.ExpatError):
        parser.Parse(content, True)


def shown(text: str, limit: int = 80) -> str:
    """Return untrusted text in printable form: escaped, on one line, cut at `limit` characters."""
    cut = text[:limit]
    plain = cut if cut.isprintable() else cut.encode("unicode_escape").decode("ascii")
    return plain if len(text) <= limit else f"{plain}..."
