"""A client for an SGLang server or router. Needs only the standard library."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""An opener that ignores the environment's proxies, because the servers are on this machine."""


class RequestFailedError(RuntimeError):
    """The server refused the request. The message contains its response."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A completed request, and how much of its prompt came from which cache."""

    text: str
    output_ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    """Number of prompt tokens that came from a cache."""
    cached_by_source: dict[str, int]
    """The same number by source, with SGLang's names: `device`, `host`, `storage`."""
    ttft_s: float
    """Seconds until the first token."""
    total_s: float


class Client:
    """Calls one base URL. Calls block; `timeout_s` limits each wait for data."""

    admin_key = ""
    """The server's `--admin-api-key`, if it has one."""

    def __init__(self, url: str, *, timeout_s: float = 120.0) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 16,
        sampling: dict[str, Any] | None = None,
        **request: Any,
    ) -> Answer:
        """Complete a prompt, greedily by default.

        Args:
            prompt: text, or token ids.
            max_new_tokens: number of tokens to generate, even after an end-of-sequence token.
            sampling: further sampling parameters of SGLang.
            request: further fields of the request, such as `cache_salt` or `lora_path`.

        Raises:
            RequestFailedError: the server answered with an error.
            OSError: the server cannot be reached, or it timed out.

        """
        body = {
            ("text" if isinstance(prompt, str) else "input_ids"): prompt,
            "sampling_params": {
                "max_new_tokens": max_new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                **(sampling or {}),
            },
            "stream": True,
            **request,
        }
        begin = time.monotonic()
        first_s, last = None, None
        with self._open("/generate", body) as response:
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if not data or data == b"[DONE]":
                    continue
                last = json.loads(data)
                if "error" in last:
                    raise RequestFailedError(f"{self.url}/generate: {last['error']}")
                first_s = first_s or time.monotonic() - begin
        if last is None or first_s is None:
            raise RequestFailedError(f"{self.url}/generate: empty response")
        meta = last["meta_info"]
        sources = meta.get("cached_tokens_details") or {}
        return Answer(
            text=last["text"],
            output_ids=last["output_ids"],
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
            cached_by_source={k: v for k, v in sources.items() if isinstance(v, int)},
            ttft_s=first_s,
            total_s=time.monotonic() - begin,
        )

    def flush_cache(self, *, wait_s: float = 30.0) -> None:
        """Wait for requests and backups to end, then empty the device and host pools.

        Raises:
            RequestFailedError: they did not end within `wait_s`.

        """
        self.post(f"/flush_cache?timeout={wait_s}")

    def is_healthy(self) -> bool:
        """Return whether the server can generate; False if it cannot be reached."""
        try:
            self.get("/health")
        except (RequestFailedError, OSError, http.client.HTTPException):
            return False
        return True

    def get(self, path: str) -> Any:
        """GET a path; return the decoded JSON, or the text if it is not JSON."""
        return self._read(path, None)

    def post(self, path: str, body: Any = None) -> Any:
        """POST a JSON body; return the response as `get` does."""
        return self._read(path, {} if body is None else body)

    def put(self, path: str, body: Any) -> Any:
        """PUT a JSON body; return the response as `get` does."""
        return self._read(path, body, "PUT")

    def _read(self, path: str, body: Any, method: str | None = None) -> Any:
        with self._open(path, body, method) as response:
            content = response.read().decode()
        try:
            return json.loads(content)
        except ValueError:
            return content

    def _open(self, path: str, body: Any, method: str | None = None) -> Any:
        key = {"Authorization": f"Bearer {self.admin_key}"} if self.admin_key else {}
        request = urllib.request.Request(  # noqa: S310 (the caller's own server)
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **key},
            method=method,
        )
        try:
            return _DIRECT.open(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                answer = error.read().decode(errors="replace")
            raise RequestFailedError(f"{self.url}{path}: {error.code} {answer}") from None
