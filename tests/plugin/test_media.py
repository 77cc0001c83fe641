"""Media that are different inputs to the model never get equal numbers in a prompt."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

import torch
from sglang.srt.managers.mm_utils import tensor_hash
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputFormat,
    MultimodalInputs,
    MultimodalProcessorOutput,
)

from memkv_sglang.log_limit import LogLimit
from memkv_sglang.plugin import media, state
from tests.sglang_versions import since_0_5_23

PIXELS = torch.arange(64, dtype=torch.float32)


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "wanted", lambda: True)
    monkeypatch.setattr(state, "server_seed", lambda: 7)


def item(feature: Any = PIXELS, modality: Modality = Modality.IMAGE, **fields: Any) -> Any:
    return MultimodalDataItem(modality=modality, feature=feature, offsets=[(3, 6)], **fields)


def padded(made: Any, hooked: bool = True) -> tuple[int, ...]:
    """Return the numbers that SGLang puts in place of an item's tokens."""
    output = MultimodalProcessorOutput(input_ids=list(range(10)), mm_items=[made])
    make: Callable[..., Any] = MultimodalInputs.from_processor_output
    inputs = media.identify_media(make, output) if hooked else make(output)
    return tuple(inputs.mm_items[0].padding_values())


def with_hash(feature: torch.Tensor, given: int) -> Any:
    made = item(feature)
    made.set_hash(given)
    return made


def grid(*sizes: int) -> Any:
    return item(model_specific_data={"image_grid_thw": torch.tensor([sizes])})


COLLISIONS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "shape": (lambda: item(PIXELS.view(8, 8)), lambda: item(PIXELS.view(4, 16))),
    "grid": (lambda: grid(1, 4, 16), lambda: grid(1, 8, 8)),
    "data type": (lambda: item(PIXELS), lambda: item(PIXELS.view(torch.int32))),
    "hash given by the caller": (
        lambda: with_hash(PIXELS, 42),
        lambda: with_hash(PIXELS + 1, 42),
    ),
    "parts of a list": (
        lambda: item([PIXELS[:32], PIXELS[32:]]),
        lambda: item([PIXELS[:16], PIXELS[16:]]),
    ),
    "modality": (lambda: item(), lambda: item(modality=Modality.AUDIO)),
    "embeddings instead of features": (
        lambda: item(),
        lambda: item(
            None, precomputed_embeddings=PIXELS, format=MultimodalInputFormat.PRECOMPUTED_EMBEDDING
        ),
    ),
}


@since_0_5_23
@pytest.mark.parametrize("name", COLLISIONS)
def test_items_that_sglang_takes_for_equal_are_told_apart(name: str) -> None:
    one, other = COLLISIONS[name]
    assert padded(one(), hooked=False) == padded(other(), hooked=False)
    assert padded(one()) != padded(other())
    assert padded(one()) == padded(one())


def test_sglang_hashes_features_without_their_shape() -> None:
    assert tensor_hash([PIXELS.view(8, 8)]) == tensor_hash([PIXELS.view(4, 16)])


@since_0_5_23
def test_equal_images_are_equal_wherever_they_are_in_a_prompt() -> None:
    moved = item()
    moved.offsets = [(5, 8)]
    assert padded(item()) == padded(moved)


@since_0_5_23
def test_all_of_the_identity_is_in_the_prompt() -> None:
    assert len(set(padded(item()))) == 4


@since_0_5_23
def test_media_known_by_a_hash_alone_stay_with_their_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(media, "_limit", LogLimit(600))

    def elsewhere() -> Any:
        made = item(None)
        made.set_hash(42)
        return made

    here = padded(elsewhere())
    assert padded(elsewhere()) == here
    assert caplog.text.count("do not share pages with other servers") == 1
    monkeypatch.setattr(state, "server_seed", lambda: 8)
    assert padded(elsewhere()) != here


@since_0_5_23
def test_servers_without_the_tier_keep_sglangs_identities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state, "wanted", lambda: False)
    assert padded(item()) == padded(item(), hooked=False)


@since_0_5_23
def test_prompts_padded_earlier_are_padded_anew() -> None:
    output = MultimodalProcessorOutput(
        input_ids=list(range(10)), mm_items=[item()], padded_input_ids=list(range(10))
    )
    assert (
        media.identify_media(MultimodalInputs.from_processor_output, output).padded_input_ids
        is None
    )


def test_versions_that_cannot_identify_media_keep_their_own_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(media, "can_identify", lambda: False)
    output = MultimodalProcessorOutput(input_ids=list(range(10)), mm_items=[item()])
    (plain,) = MultimodalInputs.from_processor_output(output).mm_items
    output = MultimodalProcessorOutput(input_ids=list(range(10)), mm_items=[item()])
    inputs = media.identify_media(MultimodalInputs.from_processor_output, output)
    assert inputs.mm_items[0].pad_value == plain.pad_value
    assert inputs.mm_items[0].model_specific_data == {}
