"""The log lines and errors that the pages for operators quote exist in the sources."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from memkv_sglang.agent.protocol import PROTOCOL_VERSION
from memkv_sglang.client.connection import OtherVersionError
from tests.documents.pages import ROOT

PAGES = [ROOT / "docs" / name for name in ("rollout.md", "troubleshooting.md")]

OURS, OF_SGLANG = "log or error", "SGLang's log or behaviour"
"""Headings of the columns with quoted texts."""

FROM_ELSEWHERE = {
    *(
        "memkv explain",
        "memkv doctor",
        "minio",
        "nvme",
        "engine.upload",
        "always",
        'minio.role = "reader"',
    ),
    *("Missing Authority Key Identifier", "CA cert does not include key usage extension"),
    *("reason=backlog", "reason=failed"),
    "cudaHostRegister failed",
}
"""Code in these columns that is not a quoted text, or that OpenSSL or SGLang prints."""

_PLACEHOLDER = re.compile(r"%[-.\d]*[sdfr]|\{\w*\}")


@cache
def texts() -> str:
    """Return every text in the package, one a line, with placeholders as NUL."""
    found = []
    for file in (ROOT / "memkv_sglang").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(_PLACEHOLDER.sub("\0", node.value).replace("%%", "%"))
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(map(_part, node.values)))
    return "\n".join(text.replace("\n", " ") for text in found)


def _part(value: ast.expr) -> str:
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else "\0"


def quotes(column: str) -> Iterator[str]:
    """Yield the code in the first column of each table whose heading is `column`."""
    for page in PAGES:
        yield from _quotes(page, column)


def _quotes(page: Path, column: str) -> Iterator[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    heading, cell = "", -1
    for i, token in enumerate(tokens):
        if token.type == "tr_open":
            cell = -1
        elif token.type in ("th_open", "td_open"):
            cell += 1
            if cell == 0 and token.type == "th_open":
                heading = tokens[i + 1].content
            elif cell == 0 and heading == column:
                yield from _codes(tokens[i + 1])


def _codes(cell: Token) -> Iterator[str]:
    return (child.content for child in cell.children or [] if child.type == "code_inline")


def pattern_of(quote: str) -> str:
    """Return a pattern in which `...` stands for anything in one text."""
    return "[^\n]*".join(map(re.escape, quote.split("...")))


def test_quoted_texts_are_in_the_sources() -> None:
    quoted = [quote for quote in quotes(OURS) if quote not in FROM_ELSEWHERE]
    missing = [quote for quote in quoted if not re.search(pattern_of(quote), texts())]
    assert not missing, "\n".join(missing)
    assert len(quoted) > 60


def test_quoted_texts_of_sglang_are_in_its_sources() -> None:
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs SGLang")
    srt = Path(spec.submodule_search_locations[0]) / "srt"
    files = [
        srt / "managers" / "cache_controller.py",
        srt / "mem_cache" / "pool_host" / "common.py",
    ]
    source = "\n".join(file.read_text() for file in files)
    quoted = [quote for quote in quotes(OF_SGLANG) if " " in quote and "memkv" not in quote]
    assert [quote for quote in quoted if not re.search(pattern_of(quote), source)] == []
    assert len(quoted) == 2


def test_message_about_versions_is_quoted() -> None:
    page = (ROOT / "docs" / "upgrades.md").read_text()
    message = str(OtherVersionError(4711, PROTOCOL_VERSION - 1))
    assert re.sub(r"\d+", "N", message) in re.sub(r"\d+", "N", page)
