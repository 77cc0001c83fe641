"""Versions of SGLang that identify images by 30 bits serve them without the tier."""

from pathlib import Path

import pytest
from sglang_cpu_platform import tiny_model
from typing_extensions import override

from memkv_sglang.config.schema import MinioConfig
from tests.serving.node import Node
from tests.serving.test_serving_images import VISION, shown
from tests.sglang_versions import IS_NEWEST

pytestmark = [
    pytest.mark.slow,  # starts a server
    pytest.mark.skipif(IS_NEWEST, reason="needs SGLang 0.5.22: later versions identify images"),
    pytest.mark.timeout(600),
]


class UntieredNode(Node):
    @override
    def wait_ready(self) -> None:
        self._server.wait_ready()


def test_a_model_that_takes_images_is_served_without_the_tier(
    home: Path, shared: MinioConfig
) -> None:
    model = home / "models" / "vision"
    tiny_model.make(model, "vision")
    with UntieredNode("vision", home, shared, model, extra=VISION) as node:
        first = shown(1, 900).ask(node.client)
        node.flush()
        again = shown(1, 900).ask(node.client)
        assert again.cached_tokens == 0
        assert again.output_ids == first.output_ids
        (line,) = (line for line in node.log().splitlines() if "memkv: off" in line)
        assert "identifies images, audio and video by 30 bits" in line
