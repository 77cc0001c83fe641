"""Options that select a chain, by a prompt, which a running server tokenizes, or by page hashes."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import click
import msgspec

from memkv_sglang.cli.http import check_server_url, fetch
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import PAGE_HASH_SIZE, Chain
from memkv_sglang.page_hash import chain_seed, page_hashes

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio import MinioTier

CALL_SECONDS = 30.0
"""Seconds for a server to respond."""

TEXT_LIMIT = 64 << 20
"""Maximum bytes of a prompt file."""

Answer = TypeVar("Answer", bound=msgspec.Struct)

Command = TypeVar("Command", bound=Callable[..., Any])


class Prompt(NamedTuple):
    """The values of `prompt_options`."""

    text: str | None
    text_file: Path | None
    tokens: str | None
    chain: str | None
    server: str
    salt: str | None
    extra_key: str | None
    namespaces: tuple[str, ...]

    def chains(self, tiers: Iterable["MinioTier"]) -> list[Chain]:
        """Return the prompt's chain in every selected namespace. Raises `ClickException`.

        The namespaces are those with a description in one of the tiers.
        """
        namespaces = {digest: one for tier in tiers for digest, one in tier.namespaces().items()}
        if self.chain is not None:
            hashes, page_size = _parse_chain(self.chain), None
        else:
            server = _Server(self.server)
            page_size = server.page_size()
            tokens = self._tokens(server)
            hashes = page_hashes(tokens, page_size, chain_seed(self.extra_key, self.salt))
            if not hashes:
                raise click.ClickException(
                    f"the prompt has {len(tokens)} tokens, fewer than a page of {page_size}"
                )
        chosen = self._select(namespaces, page_size)
        return [Chain(digest, hashes) for digest in chosen]

    def _tokens(self, server: "_Server") -> Sequence[int]:
        if self.tokens is not None:
            return _parse_tokens(self.tokens)
        return server.tokenize(_read_text(self.text_file) if self.text_file else self.text or "")

    def _select(self, published: dict[bytes, Namespace], page_size: int | None) -> list[bytes]:
        chosen = [
            digest
            for digest, namespace in published.items()
            if (not self.namespaces or digest.hex().startswith(self.namespaces))
            and page_size in (None, namespace.page_size)
        ]
        if not chosen:
            raise click.ClickException(
                "no namespace in the bucket matches; `memkv inspect` lists them, --namespace "
                "selects one"
            )
        return chosen


def prompt_options(command: Command) -> Command:
    """Add options that select a prompt; the command gets it as `prompt`."""

    @wraps(command)
    def with_prompt(**given: Any) -> Any:
        names = Prompt._fields
        prompt = Prompt(*(given.pop(name) for name in names))
        ways = (prompt.text, prompt.text_file, prompt.tokens, prompt.chain)
        if sum(way is not None for way in ways) != 1:
            raise click.UsageError("give exactly one of --text, --file, --tokens, --chain")
        _check_utf8("--text", prompt.text)
        _check_utf8("--salt", prompt.salt)
        _check_utf8("--extra-key", prompt.extra_key)
        return command(prompt=prompt, **given)

    wrapped: Any = with_prompt
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    result: Command = wrapped
    return result


_OPTIONS = (
    click.option(
        "--text", help="The prompt as text. The server applies the model's chat template to it."
    ),
    click.option(
        "text_file",
        "--file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="File with the prompt as text, as for --text.",
    ),
    click.option("--tokens", metavar="IDS", help="Token ids of the prompt, comma-separated."),
    click.option("--chain", metavar="HASHES", help="Page hashes in hex, comma-separated."),
    click.option(
        "--server",
        default="http://127.0.0.1:30000",
        show_default=True,
        help="SGLang server that provides the page size and the token ids.",
    ),
    click.option("--salt", help="Cache salt of the requests."),
    click.option("--extra-key", help="Extra key of the requests, e.g. a LoRA id."),
    click.option(
        "namespaces",
        "--namespace",
        multiple=True,
        metavar="DIGEST",
        help="Namespace or a prefix of one. May be repeated.  [default: all with this page size]",
    ),
)


Token = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _ServerInfo(msgspec.Struct):
    """The fields of `/server_info` used here."""

    page_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    speculative_algorithm: str | None = None


class _Tokenized(msgspec.Struct):
    """The fields of the response of `/tokenize` used here."""

    tokens: list[Token]


class _Server:
    """A running SGLang server. Calls raise `ClickException`."""

    def __init__(self, url: str) -> None:
        self._url = check_server_url(url, "--server")

    def page_size(self) -> int:
        info = self._request("/server_info", _ServerInfo)
        if (info.speculative_algorithm or "").upper().startswith("EAGLE"):
            raise click.ClickException(
                "the server uses EAGLE speculation, which hashes pairs of tokens; use --chain"
            )
        return info.page_size

    def tokenize(self, text: str) -> Sequence[int]:
        return self._request("/tokenize", _Tokenized, {"prompt": text}).tokens

    def _request(self, path: str, kind: type[Answer], body: dict[str, Any] | None = None) -> Answer:
        url = self._url + path
        content = fetch(
            url,
            CALL_SECONDS,
            json.dumps(body).encode() if body is not None else None,
            advice="; start the server, or use --chain",
        )
        try:
            return msgspec.json.decode(content, type=kind)
        except (ValueError, RecursionError) as error:  # also covers msgspec's exceptions
            raise click.ClickException(
                f"unexpected response from {url} ({error}); check --server, or use --chain"
            ) from None


def _parse_chain(text: str) -> list[bytes]:
    names = [name for name in re.split(r"[,\s]+", text) if name]
    for name in names:
        if not re.fullmatch(rf"[0-9a-fA-F]{{{2 * PAGE_HASH_SIZE}}}", name):
            digits = 2 * PAGE_HASH_SIZE
            raise click.UsageError(f"--chain: {name[:70]!r} is not {digits} hex digits")
    if not names:
        raise click.UsageError("--chain: has no hash; give at least one")
    return [bytes.fromhex(name) for name in names]


def _parse_tokens(text: str) -> list[int]:
    tokens = [token for token in re.split(r"[,\s]+", text) if token]
    for token in tokens:
        if not re.fullmatch(r"[0-9]{1,18}", token):
            raise click.UsageError(f"--tokens: {token[:30]!r} is not a token id; use e.g. 1,2,3")
    return [int(token) for token in tokens]


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            content = stream.read(TEXT_LIMIT + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise click.UsageError(
            f"--file: cannot read {file} ({reason}); name another file"
        ) from None
    if len(content) > TEXT_LIMIT:
        raise click.UsageError(f"--file: {file} is larger than {TEXT_LIMIT >> 20} MiB")
    return text


def _check_utf8(option: str, text: str | None) -> None:
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise click.UsageError(f"{option}: is not UTF-8 text; use UTF-8") from None
