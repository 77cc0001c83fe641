"""What a server or a stranger's object says, made safe to parse and to show."""

import re
from contextlib import suppress
from typing import NoReturn
from xml.parsers import expat

DEPTH_LIMIT = 16
"""Levels of XML; S3's answers have five."""

NODE_LIMIT = 64_000
"""Elements and attributes: a thousand objects of a listing have about twelve each."""

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_REFERENCE = re.compile("&#(x[0-9A-Fa-f]+|[0-9]+);")

REPLACEMENT = "\t"
"""Stands for what XML forbids in a name. It sorts before all that names of ours are made of."""


def parseable_xml(content: bytes) -> bytes:
    """Return an answer that can be parsed in little memory and time.

    Replaces characters that XML forbids, which some servers copy from object names. Raises
    `ValueError` for XML with a document type (entities), too deep or of too many parts. Malformed
    XML, such as a proxy's web page, passes: the parser fails where this check stopped.
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
    """Return text from outside as it can be printed: escaped, on one line, not too long."""
    cut = text[:limit]
    plain = cut if cut.isprintable() else cut.encode("unicode_escape").decode("ascii")
    return plain if len(text) <= limit else f"{plain}..."
