"""Which chain a command is about: a prompt as a running server cuts it into pages, or hashes."""

import json
import re
import urllib.request
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import PAGE_HASH_SIZE, Chain
from memkv_sglang.page_hash import chain_seed, page_hashes

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio import MinioTier

CALL_SECONDS = 30.0
"""Longest time for a server's answer."""

Command = TypeVar("Command", bound=Callable[..., Any])


class Prompt(NamedTuple):
    """What the options say; see `prompt_options`."""

    text: str | None
    text_file: Path | None
    tokens: str | None
    chain: str | None
    server: str
    salt: str | None
    extra_key: str | None
    namespaces: tuple[str, ...]

    def chains(self, tier: "MinioTier") -> list[Chain]:
        """Return the prompt's pages in every namespace meant. Raises `ClickException`."""
        described = tier.namespaces()
        if self.chain is not None:
            hashes, page_size = _parse_chain(self.chain), None
        else:
            server = _Server(self.server)
            page_size = server.page_size()
            tokens = self._tokens(server)
            hashes = page_hashes(tokens, page_size, chain_seed(self.extra_key, self.salt))
            if not hashes:
                raise click.ClickException(
                    f"the prompt has {len(tokens)} tokens, less than a page of {page_size}"
                )
        chosen = self._choose(described, page_size)
        return [Chain(digest, hashes) for digest in chosen]

    def _tokens(self, server: "_Server") -> Sequence[int]:
        if self.tokens is not None:
            return _parse_tokens(self.tokens)
        return server.tokenize(self.text_file.read_text() if self.text_file else self.text or "")

    def _choose(self, described: dict[bytes, Namespace], page_size: int | None) -> list[bytes]:
        chosen = [
            digest
            for digest, namespace in described.items()
            if (not self.namespaces or digest.hex().startswith(self.namespaces))
            and page_size in (None, namespace.page_size)
        ]
        if not chosen:
            raise click.ClickException(
                "no namespace of the bucket fits; `memkv inspect` lists them, --namespace names one"
            )
        return chosen


def prompt_options(command: Command) -> Command:
    """Add the options that name a prompt; the command is called with `prompt`."""

    @wraps(command)
    def with_prompt(**given: Any) -> Any:
        names = Prompt._fields
        prompt = Prompt(*(given.pop(name) for name in names))
        ways = (prompt.text, prompt.text_file, prompt.tokens, prompt.chain)
        if sum(way is not None for way in ways) != 1:
            raise click.UsageError("name the prompt by one of --text, --file, --tokens, --chain")
        return command(prompt=prompt, **given)

    wrapped: Any = with_prompt
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    result: Command = wrapped
    return result


_OPTIONS = (
    click.option("--text", help="The prompt, as the model gets it (chat template applied)."),
    click.option(
        "text_file",
        "--file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="File with the prompt.",
    ),
    click.option("--tokens", metavar="IDS", help="The prompt's token ids, comma-separated."),
    click.option("--chain", metavar="HASHES", help="Page hashes in hex, comma-separated."),
    click.option(
        "--server",
        default="http://127.0.0.1:30000",
        show_default=True,
        help="SGLang server that tells page size and token ids.",
    ),
    click.option("--salt", help="Cache salt of the requests that are meant."),
    click.option("--extra-key", help="Their extra key, such as a LoRA's id."),
    click.option(
        "namespaces",
        "--namespace",
        multiple=True,
        metavar="DIGEST",
        help="Namespace, or its beginning; several are fine. Else all with the server's page size.",
    ),
)


class _Server:
    """A running SGLang server. Calls raise `ClickException`."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def page_size(self) -> int:
        info = self._ask("/server_info")
        if str(info.get("speculative_algorithm") or "").upper().startswith("EAGLE"):
            raise click.ClickException(
                "the server speculates with EAGLE, which hashes pairs of tokens; use --chain"
            )
        return int(info["page_size"])

    def tokenize(self, text: str) -> Sequence[int]:
        tokens: Sequence[int] = self._ask("/tokenize", {"prompt": text})["tokens"]
        return tokens

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        if not self._url.startswith(("http://", "https://")):
            raise click.UsageError(f"--server: {self._url[:60]!r} is no http URL")
        request = urllib.request.Request(  # noqa: S310 - http, as was just checked
            self._url + path,
            data=json.dumps(body).encode() if body is not None else None,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=CALL_SECONDS) as response:  # noqa: S310
                answer: dict[str, Any] = json.load(response)
        except (OSError, ValueError) as error:
            raise click.ClickException(
                f"no answer from {self._url}{path} ({error}); start the server, or use --chain"
            ) from None
        return answer


def _parse_chain(text: str) -> list[bytes]:
    names = [name for name in re.split(r"[,\s]+", text) if name]
    for name in names:
        if not re.fullmatch(rf"[0-9a-fA-F]{{{2 * PAGE_HASH_SIZE}}}", name):
            digits = 2 * PAGE_HASH_SIZE
            raise click.UsageError(f"--chain: {name[:70]!r} has not {digits} hex digits")
    if not names:
        raise click.UsageError("--chain: names no page")
    return [bytes.fromhex(name) for name in names]


def _parse_tokens(text: str) -> list[int]:
    try:
        return [int(token) for token in re.split(r"[,\s]+", text) if token]
    except ValueError as error:
        raise click.UsageError(f"--tokens: {error}; write ids like 1,2,3") from None


def demand_bucket(config: MinioConfig) -> None:
    """Raise `ClickException` where there is no MinIO tier."""
    if not config.endpoint:
        raise click.ClickException("minio.endpoint is empty, so there is no bucket; set it")
