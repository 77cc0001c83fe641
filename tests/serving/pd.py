"""Prefill and decode servers of one model, each on a node of its own."""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sglang_cpu_platform.client import Answer
from sglang_cpu_platform.server import HOST, free_port

from memkv_sglang.config.schema import MinioConfig
from tests.serving.node import LIMIT, NEW_TOKENS, Node, Tokens

_rooms = itertools.count(1)


class PdNode(Node):
    """A node whose server has one of the two roles."""

    def __init__(
        self,
        name: str,
        home: Path,
        minio: MinioConfig,
        model: Path,
        role: str,
        extra: Sequence[str] = (),
        **arguments: Any,
    ) -> None:
        self.bootstrap_port = free_port()
        pd = [
            *("--disaggregation-mode", role, "--disaggregation-transfer-backend", "mooncake_tcp"),
            *("--disaggregation-bootstrap-port", str(self.bootstrap_port)),
            "--disable-overlap-schedule",
        ]
        super().__init__(name, home, minio, model, extra=[*pd, *extra], **arguments)

    def wait_ready(self) -> None:
        self._server.wait_ready()
        self.wait_for_agent()


class PdAnswer(NamedTuple):
    prefill: Answer
    decode: Answer

    @property
    def output_ids(self) -> list[int]:
        return self.decode.output_ids


def ask(
    prefill: PdNode,
    decode: PdNode,
    tokens: Tokens,
    new_tokens: int = NEW_TOKENS,
    **request: Any,
) -> PdAnswer:
    """Ask both servers for the same, as the router does."""
    bootstrap: dict[str, Any] = {
        "bootstrap_host": HOST,
        "bootstrap_port": prefill.bootstrap_port,
        "bootstrap_room": next(_rooms),
    }
    with ThreadPoolExecutor(2) as pool:
        first, second = (
            pool.submit(
                node.client.generate, tokens, max_new_tokens=new_tokens, **bootstrap, **request
            )
            for node in (prefill, decode)
        )
        return PdAnswer(first.result(LIMIT), second.result(LIMIT))
