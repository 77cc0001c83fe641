"""Read request traces of three formats: Mooncake's, coding agents' and the recorder's."""

import gzip
import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.planning.workload import (
    Blocks,
    Template,
    TemplateTurn,
    as_blocks,
    count_pages,
    first_pages,
)

LARGEST_LINE = 64 << 20
"""Maximum length of a line in bytes."""
LARGEST_PROMPT = 1 << 20
"""Maximum number of pages of a prompt."""
MOONCAKE_BLOCK = 512
"""Tokens per block in Mooncake's traces."""


class Request(NamedTuple):
    """A request of a trace."""

    seconds: float
    """Seconds since the beginning of the trace."""
    blocks: Blocks
    """The prompt's pages. Pages have equal numbers if the prefixes that they end are equal."""
    tokens: int
    output: int
    stored: int | None = None
    """Number of the prompt's pages that the tiers held when it was recorded, if known."""

    def runs(self, run: int = 1) -> list[int]:
        """Return the numbers of the runs of `run` pages. A run has the number of its first page."""
        return first_pages(self.blocks, run)

    @property
    def pages(self) -> int:
        """Number of pages."""
        return count_pages(self.blocks)


class Trace(NamedTuple):
    """A trace of requests, in the order of their times."""

    name: str
    requests: Sequence[Request]
    page_tokens: int
    sessions: Sequence[Template] = ()
    """The same requests by session, if the trace has sessions."""

    @property
    def pages(self) -> int:
        """Number of different pages."""
        return len({page for request in self.requests for page in request.runs()})

    @property
    def ideal_hits(self) -> int:
        """Number of pages that hit in a cache that never evicts."""
        seen: set[int] = set()
        hits = 0
        for request in self.requests:
            pages = request.runs()
            hits += next((i for i, page in enumerate(pages) if page not in seen), len(pages))
            seen.update(pages)
        return hits


_Seconds = Annotated[float, Meta(ge=-1e15, le=1e15)]
_Tokens = Annotated[int, Meta(ge=0, le=1 << 40)]
_PageNumber = Annotated[int, Meta(ge=0, le=1 << 31)]


class _MooncakeLine(msgspec.Struct):
    timestamp: _Seconds
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: Annotated[
        list[Annotated[int, Meta(ge=-(1 << 62), le=1 << 62)]], Meta(max_length=LARGEST_PROMPT)
    ]


_AgenticTurn = tuple[
    _Seconds, _Seconds, _Seconds, _Tokens, _Tokens, list[tuple[_PageNumber, _PageNumber]]
]


class _Subagent(msgspec.Struct):
    t: _Seconds
    requests: list[_AgenticTurn]


class _AgenticLine(msgspec.Struct):
    id: str
    block_tokens: Annotated[int, Meta(ge=1, le=1 << 20)]
    tool_tokens: Annotated[int, Meta(ge=0, le=1 << 28)]
    system_tokens: _Tokens
    requests: list[_AgenticTurn]
    subagents: list[_Subagent] = []


class _RecordHead(msgspec.Struct):
    memkv_record: int


class _Record(msgspec.Struct):
    t: _Seconds
    ns: str
    n: Annotated[int, Meta(ge=0, le=LARGEST_PROMPT)]
    """Number of pages that the lookup asked for, which are the last ones of the chain."""
    hit: Annotated[int, Meta(ge=0, le=LARGEST_PROMPT)]
    at: Annotated[int, Meta(ge=0)] = 0
    """Number of pages before `new`, which the record omits."""
    parent: str = ""
    """Hash of the last omitted page."""
    new: str = ""
    """Hashes of the other pages, 16 hex digits each."""


def read_trace(file: Path, *, spacing: float = 30.0, page_tokens: int = 64) -> Trace:
    """Read a trace, detecting its format by the first line; `.gz` files are decompressed.

    Args:
        file: the trace, one JSON object a line.
        spacing: seconds between the starts of sessions, for traces without start times.
        page_tokens: tokens per page, for the recorder's traces, which do not contain it.

    Raises `ConfigError` with one line that names the file and line.

    """
    lines = _lines(file)
    first = next(lines, None)
    if first is None:
        raise ConfigError(f"{file}: empty; give a trace")
    rest = itertools.chain([first], lines)
    head = _decode(file, 1, first, dict[str, Any])
    if "hash_ids" in head:
        return _mooncake(file, rest)
    if "block_tokens" in head:
        return _agentic(file, rest, spacing)
    if "memkv_record" in head:
        return _recorded(file, rest, page_tokens)
    raise ConfigError(
        f"{file}: unknown format; give a trace of Mooncake (hash_ids), of coding agents "
        "(block_tokens) or of the recorder (memkv_record)"
    )


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as plain:
            is_packed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(file, "rb") if is_packed else file.open("rb") as stream:
            while line := stream.readline(LARGEST_LINE):
                if len(line) == LARGEST_LINE:
                    raise ConfigError(f"{file}: a line is longer than 64 MiB; this is not a trace")
                if line.strip():
                    yield line
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{file}: {reason}") from None


def _decode(file: Path, number: int, line: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}, line {number}: not a request ({error})") from None


def _mooncake(file: Path, lines: Iterator[bytes]) -> Trace:
    requests = []
    for number, line in enumerate(lines, 1):
        one: _MooncakeLine = _decode(file, number, line, _MooncakeLine)
        blocks = as_blocks(one.hash_ids)
        requests.append(Request(one.timestamp / 1e3, blocks, one.input_length, one.output_length))
    requests.sort(key=lambda request: request.seconds)
    return Trace("mooncake", requests, MOONCAKE_BLOCK)


def _agentic(file: Path, lines: Iterator[bytes], spacing: float) -> Trace:
    """Each session starts `spacing` seconds after the one before, and includes its subagents."""
    requests: list[Request] = []
    templates: list[Template] = []
    block_tokens = 0
    for number, line in enumerate(lines, 1):
        one: _AgenticLine = _decode(file, number, line, _AgenticLine)
        if block_tokens not in (0, one.block_tokens):
            raise ConfigError(f"{file}, line {number}: block_tokens differs from other sessions'")
        block_tokens = one.block_tokens
        template = _template(file, number, one)
        templates.append(template)
        start, base = number * spacing, number << 32
        group = (one.tool_tokens + 1) << 32
        for offset, turns in [(0.0, one.requests), *((s.t, s.requests) for s in one.subagents)]:
            for seconds, _, _, tokens, output, blocks in turns:
                _check_blocks(file, number, blocks)
                pages = _relabel(blocks, template.shared_pages, -group, base)
                requests.append(Request(start + offset + seconds, pages, tokens, output))
    requests.sort(key=lambda request: request.seconds)
    return Trace("agentic", requests, block_tokens, templates)


def _check_blocks(file: Path, line: int, blocks: Sequence[tuple[int, int]]) -> None:
    if count_pages(blocks) > LARGEST_PROMPT:
        raise ConfigError(f"{file}, line {line}: a prompt has more than {LARGEST_PROMPT:,} blocks")


def _relabel(blocks: Blocks, shared: int, group: int, base: int) -> Blocks:
    """Return blocks in which shared pages are numbered per group, and all others per session."""
    result = []
    for first, count in blocks:
        common = min(max(0, shared + 1 - first), count)
        if common:
            result.append((group + first, common))
        if count > common:
            result.append((base + first + common, count - common))
    return result


def _template(file: Path, line: int, one: _AgenticLine) -> Template:
    """Return only the main agent's requests. Its subagents would need sessions of their own."""
    turns = []
    for _, think, _, tokens, output, blocks in one.requests:
        _check_blocks(file, line, blocks)
        if pages := count_pages(blocks):
            turns.append(TemplateTurn(max(think, 0.0), blocks, pages, tokens, output))
    return Template(turns, one.tool_tokens, one.tool_tokens // one.block_tokens)


def _recorded(file: Path, lines: Iterator[bytes], page_tokens: int) -> Trace:
    """Rebuild whole chains from their suffixes.

    A record whose parent is missing starts a new chain at that parent.
    """
    numbers: dict[str, int] = {}
    parents: list[int] = []

    def number_of(name: str, parent: int) -> int:
        if name not in numbers:
            numbers[name] = len(numbers)
            parents.append(parent)
        return numbers[name]

    requests: list[Request] = []
    start: float | None = None
    for number, line in enumerate(lines, 1):
        if b"memkv_record" in line:
            _decode(file, number, line, _RecordHead)
            continue
        one: _Record = _decode(file, number, line, _Record)
        if len(one.new) % 16:
            raise ConfigError(f"{file}, line {number}: `new` is not a list of 8-byte hashes")
        last = number_of(one.ns + one.parent, -1) if one.at else -1
        for i in range(0, len(one.new), 16):
            last = number_of(one.ns + one.new[i : i + 16], last)
        blocks = _chain(last, one.n, parents)
        start = one.t if start is None else start
        tokens = count_pages(blocks) * page_tokens
        requests.append(Request(one.t - start, blocks, tokens, 0, one.hit))
    requests.sort(key=lambda request: request.seconds)
    return Trace("recorder", requests, page_tokens)


def _chain(last: int, count: int, parents: Sequence[int]) -> Blocks:
    """Return a page with its ancestors, root first, but at most `count` pages."""
    pages: list[int] = []
    while last >= 0 and len(pages) < count:
        pages.append(last)
        last = parents[last]
    return as_blocks(pages[::-1])
