"""Untrusted text is escaped and bounded wherever it is printed or logged."""

import io
import json
import logging
import re
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from memkv_sglang.agent.log import LogfmtFormatter
from memkv_sglang.cli.output import human_date, human_size, human_time, make_console, print_line
from memkv_sglang.printable import LIMIT, json_text, printable, quoted
from tests.cases.commands import assert_clean

TRICKS = (
    *("[/v2]", "[red]x[/red]", ":smile:", "\\", '"', "level=error event=forged"),
    *("\x1b[2J\x1b]0;title\x07", "\x9b31m", "a\rb", "a\nb", "a\tb", "\x00", "\x7f", "\u2028"),
    *("\u202eevil", "\u2066x\u2069", "\u200b", "\ud800", "\udcff", "\U000e0041"),
    *("\u00e9", "\u4e2d", "e\u0301"),
)
tricky = st.lists(st.sampled_from(TRICKS) | st.text(max_size=5), max_size=300).map("".join)


@given(tricky)
def test_text_is_printable_on_one_line_and_bounded(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) <= 12 * (LIMIT + 40)
    if text.isprintable() and len(text) <= LIMIT:
        assert shown == text


@given(tricky)
def test_quoted_text_reads_back(text: str) -> None:
    shown = quoted(text, 10_000)
    assert shown.isprintable()
    # JSON combines a surrogate pair into one character.
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    assert json.loads(shown) == joined


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | tricky,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(tricky, inner, max_size=3),
        max_leaves=10,
    )
)
def test_json_is_always_valid(value: object) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = json_text(value)
    read = json.loads(text, parse_constant=refuse)
    assert_clean(text)
    json.dumps(read, ensure_ascii=False).encode()  # fails if a surrogate is unpaired


@given(st.dictionaries(st.sampled_from("abc"), tricky | st.floats() | st.integers()), tricky)
def test_a_log_record_is_one_line_whatever_it_holds(fields: dict[str, Any], event: str) -> None:
    record = logging.LogRecord("memkv_sglang", logging.INFO, "", 0, "%s", (event,), None)
    record.fields = fields
    line = LogfmtFormatter().format(record)
    assert line.isprintable()
    # No value can imitate another field: outside quotes, each name occurs once.
    bare = re.sub(r'"(\\.|[^"\\])*"', "", line)
    names = [part.partition("=")[0] for part in bare.split()]
    assert names == ["time", "level", "logger", "event", *fields]


def test_a_logged_exception_is_bounded() -> None:
    try:
        raise ValueError("\x1b[2J" * 100_000)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", None, sys.exc_info())
    line = LogfmtFormatter().format(record)
    assert line.isprintable()
    assert len(line) < 100_000
    assert "Traceback" in line


@pytest.mark.parametrize("trick", TRICKS)
def test_a_console_prints_text_as_it_is_in_every_structure(trick: str) -> None:
    console = make_console()
    console.file = file = io.StringIO()
    table = Table("head", box=None)
    table.add_row(trick)
    console.print(table)
    console.print(trick)
    lines = file.getvalue().splitlines()
    assert_clean(file.getvalue())
    assert lines[1].strip() == lines[2].strip() == printable(trick)
    assert len(lines) == 3


@given(st.floats() | st.integers(-(2**70), 2**70))
def test_any_number_is_shown(number: float) -> None:
    for show in (human_date, human_size, human_time):
        assert len(show(number)) < 40


def test_a_line_is_printed_as_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("reason: \x1b[2J\nforged " + "x" * 10_000)
    out = capsys.readouterr().out
    assert out.startswith("reason: \\u001b[2J\\u000aforged x")
    assert out.count("\n") == 1
    assert len(out) < 5_000
