"""The documentation's code: fenced blocks, code spans and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "patches/*.md", "cpu-platform/*.md", "*/README.md")
    for path in ROOT.glob(pattern)
)

SHELLS = ("bash", "sh")

_ENDS = re.compile(r"[;&|()]+")
_ASSIGNMENT = re.compile(r"[A-Za-z_]+=.*")
_REDIRECTION = re.compile(r"[<>]+")
_KEYWORDS = ("do", "then", "export")


class Block(NamedTuple):
    """A fenced block."""

    place: str
    """Page and line, for messages."""
    language: str
    text: str


class Command(NamedTuple):
    """One command of a shell block."""

    place: str
    words: tuple[str, ...]
    """The command's words, without variable assignments, `sudo`, `ssh` and redirections."""

    @property
    def name(self) -> str:
        return Path(self.words[0]).name


class Span(NamedTuple):
    """Code within a sentence."""

    place: str
    text: str


@cache
def blocks() -> list[Block]:
    """Return the blocks of all pages."""
    return [
        Block(_place(page, token.map), token.info.strip(), token.content)
        for page in PAGES
        for token in MarkdownIt("commonmark").parse(page.read_text())
        if token.type == "fence"
    ]


@cache
def spans() -> list[Span]:
    """Return the code spans of all pages."""
    return [span for page in PAGES for span in spans_of(page)]


def spans_of(page: Path) -> list[Span]:
    """Return the code spans of a page."""
    return [
        Span(_place(page, token.map), child.content)
        for token in MarkdownIt("commonmark").enable("table").parse(page.read_text())
        for child in token.children or []
        if child.type == "code_inline"
    ]


def _place(page: Path, lines: list[int] | None) -> str:
    return f"{page.relative_to(ROOT)}:{lines[0] + 1 if lines else 0}"


@cache
def commands() -> list[Command]:
    """Return the commands of all shell blocks."""
    return [
        Command(block.place, words)
        for block in blocks()
        if block.language in SHELLS
        for words in _commands(block.text)
    ]


def _commands(text: str) -> Iterator[tuple[str, ...]]:
    for line in _logical_lines(text):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not _ENDS.fullmatch(word):
                words.append(word)
            else:
                if command := _stripped(words):
                    yield tuple(command)
                words = []


def _logical_lines(text: str) -> Iterator[str]:
    """Join lines that a backslash or an open quote continues."""
    line = ""
    for piece in text.splitlines():
        line += piece
        if line.endswith("\\"):
            line = line[:-1]
        elif not _is_open(line):
            yield line
            line = ""
        else:
            line += "\n"
    assert not line, f"unfinished: {line}"


def _is_open(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return False


def _stripped(words: list[str]) -> list[str]:
    """Return the command itself; empty for `for`, `done` and assignments alone."""
    while words:
        first = words[0]
        if first in _KEYWORDS or _ASSIGNMENT.fullmatch(first):
            words = words[1:]
        elif first == "sudo":
            words = words[3 if words[1] == "-u" else 1 :]
        elif first == "ssh":
            words = words[3 if words[1] == "-t" else 2 :]
        else:
            break
    if not words or words[0] in ("for", "done"):
        return []
    end = next((i for i, word in enumerate(words) if _REDIRECTION.fullmatch(word)), len(words))
    return words[:end]
