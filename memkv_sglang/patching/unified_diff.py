"""Apply unified diffs exactly.

No library does this: `unidiff` only parses, and `whatthepatch` drops a file's last newline and
splits lines at form feeds. Fuzzy matching is not needed, because a series only applies to files of
known checksum. Every line must end with a newline.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_NEW_FILE = re.compile(rb"\+\+\+ b/(\S+)\n\Z")
_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class MismatchError(Exception):
    """The content of a file does not match the diff."""


class Hunk(NamedTuple):
    """Consecutive lines, with their newlines, and the lines that replace them."""

    old_start: int
    """Index of the first old line, from 0."""
    old: list[bytes]
    new_start: int
    new: list[bytes]


class FileDiff(NamedTuple):
    """The hunks of one file, in order."""

    path: str
    hunks: list[Hunk]


def parse(diff: bytes) -> list[FileDiff]:
    """Return the changes of a diff; ignores text around the files' diffs."""
    files: list[FileDiff] = []
    lines = iter(diff.splitlines(keepends=True))
    for line in lines:
        if file := _NEW_FILE.match(line):
            files.append(FileDiff(file[1].decode(), []))
        elif header := _HUNK.match(line):
            files[-1].hunks.append(_hunk(header, lines))
    return files


def apply(content: bytes, hunks: Sequence[Hunk]) -> bytes:
    """Return the changed content. Raises `MismatchError`."""
    lines = content.splitlines(keepends=True)
    result: list[bytes] = []
    done = 0
    for hunk in hunks:
        end = hunk.old_start + len(hunk.old)
        if hunk.old_start < done or lines[hunk.old_start : end] != hunk.old:
            raise MismatchError(f"line {hunk.old_start + 1} does not match")
        result += lines[done : hunk.old_start] + hunk.new
        done = end
    return b"".join(result + lines[done:])


def revert(content: bytes, hunks: Sequence[Hunk]) -> bytes:
    """Undo `apply`. Raises `MismatchError`."""
    return apply(content, [Hunk(h.new_start, h.new, h.old_start, h.old) for h in hunks])


def _hunk(header: re.Match[bytes], lines: Iterator[bytes]) -> Hunk:
    """Read a hunk's lines, as many as its header states."""
    old_start, old_count, new_start, new_count = (int(n or 1) for n in header.groups())
    # In a diff that creates a file, the old range starts at 0.
    hunk = Hunk(old_start - bool(old_count), [], new_start - bool(new_count), [])
    while len(hunk.old) < old_count or len(hunk.new) < new_count:
        line = next(lines)
        if line[:1] != b"+":
            hunk.old.append(line[1:])
        if line[:1] != b"-":
            hunk.new.append(line[1:])
    return hunk
