"""A model that takes images: pages of a prompt are reused only for the same images."""

import base64
import io
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from memkv_testbed.minio_server import MinioServer
from PIL import Image
from sglang_cpu_platform import tiny_model
from sglang_cpu_platform.client import Answer, Client
from sglang_cpu_platform.server import CpuServer
from sglang_cpu_platform.tiny_model import IMAGE

from memkv_sglang.config.schema import MinioConfig
from tests.serving.node import (
    DEVICE_TOKENS,
    NEW_TOKENS,
    PAGE,
    Node,
    from_storage,
    libraries,
    reusable,
    start_all,
    whole_pages,
)
from tests.sglang_versions import since_0_5_23

pytestmark = [
    since_0_5_23,
    pytest.mark.slow,  # starts three servers
    pytest.mark.timeout(900),  # the first test waits for the servers
]

VISION = ["--enable-multimodal", "--mm-attention-backend", "sdpa"]
IMAGE_TOKENS = 50
"""Tokens of a 224 x 168 pixel image, including the markers around it."""


class Shown(NamedTuple):
    """A prompt that begins with an image."""

    pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]"
    text: str

    def ask(self, client: Client) -> Answer:
        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        return client.generate(IMAGE + self.text, max_new_tokens=NEW_TOKENS, image_data=[url])


def shown(seed: int, length: int) -> Shown:
    """Return a prompt that shares neither image nor text with those of other seeds."""
    random = np.random.default_rng(seed)
    letters = random.integers(ord("a"), ord("z"), length, dtype=np.uint8)
    return Shown(random.integers(0, 256, (168, 224, 3), dtype=np.uint8), letters.tobytes().decode())


class Seeing(NamedTuple):
    a: Node
    b: Node
    plain: CpuServer


@pytest.fixture(scope="module")
def seeing(home: Path, shared: MinioConfig) -> Iterator[Seeing]:
    model = home / "models" / "vision"
    tiny_model.make(model, "vision")
    plain = CpuServer(
        model,
        log=home / "plain-images.log",
        max_total_tokens=DEVICE_TOKENS,
        extra=["--disable-radix-cache", *VISION],
        env=libraries(home),
        forks=Node.forks,
    )
    a, b = (Node(f"images-{name}", home, shared, model, extra=VISION) for name in "ab")
    with ExitStack() as stack:
        for close in (plain.kill, a.close, b.close):
            stack.callback(close)
        start_all(plain, a, b)
        yield Seeing(a, b, plain)


def test_texts_stay_the_same_and_pages_come_from_the_other_node(seeing: Seeing) -> None:
    prompts = [shown(seed, 300 + 20 * seed) for seed in range(30)]
    computed = [each.ask(seeing.plain.client).output_ids for each in prompts]
    assert [each.ask(seeing.a.client).output_ids for each in prompts] == computed
    seeing.a.share()
    answers = [each.ask(seeing.b.client) for each in prompts]
    assert [answer.output_ids for answer in answers] == computed
    assert [from_storage(a) for a in answers] == [reusable(a.prompt_tokens) for a in answers]
    assert answers[0].prompt_tokens == IMAGE_TOKENS + 300


def test_another_image_under_the_same_text_reuses_nothing(seeing: Seeing) -> None:
    base = shown(100, 900)
    base.ask(seeing.a.client)
    seeing.a.share()
    darker = base.pixels.copy()
    darker[:28, :28] //= 2
    for pixels in (darker, base.pixels[::-1].copy()):
        other = base._replace(pixels=pixels)
        answer = other.ask(seeing.b.client)
        assert answer.cached_tokens == 0
        assert answer.output_ids == other.ask(seeing.plain.client).output_ids


def test_images_with_equal_bytes_and_different_shapes_reuse_nothing(seeing: Seeing) -> None:
    wide = Shown(np.full((56, 112, 3), 90, np.uint8), shown(200, 900).text)
    high = wide._replace(pixels=np.full((112, 56, 3), 90, np.uint8))
    computed = wide.ask(seeing.a.client)
    seeing.a.share()
    answer = high.ask(seeing.b.client)
    assert answer.prompt_tokens == computed.prompt_tokens
    assert answer.cached_tokens == 0
    assert answer.output_ids == high.ask(seeing.plain.client).output_ids


def test_a_changed_token_after_the_image_ends_the_reuse_at_its_page(seeing: Seeing) -> None:
    base = shown(300, 900)
    base.ask(seeing.a.client)
    seeing.a.share()
    for point in (300, 14 + 5 * PAGE, 899):
        other = base._replace(text=base.text[:point] + "Z" + shown(point, 200).text)
        seeing.b.flush()
        answer = other.ask(seeing.b.client)
        assert from_storage(answer) == whole_pages(IMAGE_TOKENS + point), point
        assert answer.output_ids == other.ask(seeing.plain.client).output_ids


def test_a_restarted_server_loads_from_its_disk(seeing: Seeing, storage: MinioServer) -> None:
    base = shown(400, 900)
    computed = base.ask(seeing.a.client)
    seeing.a.share()
    seeing.a.kill_server()
    storage.kill()
    try:
        start_all(seeing.a)
        answer = base.ask(seeing.a.client)
    finally:
        storage.start()
    assert from_storage(answer) == reusable(answer.prompt_tokens)
    assert answer.output_ids == computed.output_ids
