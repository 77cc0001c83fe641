"""Identify images, audio and video in prompts, so that different inputs never share pages.

SGLang replaces an image's tokens by numbers derived from its identity, so the identity becomes part
of the page hashes. Often the identity is only a 64-bit hash of the features' bytes, and features of
different shapes can have equal bytes. Callers can also supply any hash. The hook replaces the
identity with a digest of everything that the model gets: content, shape and grid.

Before 0.5.23, an identity in SGLang had 30 bits, and could not be replaced. With such a version,
the tier is off for models that take media.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import numpy as np
import xxhash

from memkv_sglang.log_limit import LogLimit
from memkv_sglang.plugin import state

log = logging.getLogger(__name__)

LOG_SECONDS = 600.0

_limit = LogLimit(LOG_SECONDS)


class _UnreadableError(Exception):
    """The content of a value cannot be read in this process."""


def can_identify() -> bool:
    """Return whether this SGLang lets the hook identify media."""
    from sglang.srt.managers.schedule_batch import MultimodalDataItem

    return hasattr(MultimodalDataItem, "set_identity")


def identify_media(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wrap `MultimodalInputs.from_processor_output`, which gives media their identities.

    Runs in the scheduler's thread on every rank. Equal items get equal identities on all ranks.
    """
    inputs = original(*args, **kwargs)
    if state.wanted() and can_identify():
        for item in inputs.mm_items:
            item.set_identity(_identity(item))
        inputs.padded_input_ids = None  # these contain SGLang's own identities
    return inputs


def _identity(item: Any) -> bytes:
    """Return 32 bytes, which differ if the model gets different inputs for two items."""
    given = item.identity or item.hash.to_bytes(8, "big")
    digest = hashlib.sha256(b"memkv media 1" + given)
    features = item.feature if item.feature is not None else item.precomputed_embeddings
    try:
        seen = (_present(features), item.precomputed_embeddings, item.model_specific_data)
        for content in _contents((item.modality, item.format, *seen)):
            digest.update(len(content).to_bytes(8, "big") + content)
    except _UnreadableError as error:
        digest.update(b"of this server" + state.server_seed().to_bytes(16, "big"))
        if _limit.admit(error.args) is not None:
            log.warning(
                "memkv: requests with %s do not share pages with other servers, because only a "
                "hash of their media is known",
                error,
            )
    return digest.digest()


def _present(features: Any) -> Any:
    if features is None:
        raise _UnreadableError("media that another process holds")
    return features


def _contents(value: Any) -> Iterator[bytes]:
    """Yield bytes that are equal only for equal values. Raises `_UnreadableError`."""
    import torch

    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield xxhash.xxh3_128_digest(raw.numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype} {value.shape}".encode()
        yield xxhash.xxh3_128_digest(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, dict):
        yield f"dict {len(value)}".encode()
        for name in sorted(value, key=str):
            yield from _contents((name, value[name]))
    elif isinstance(value, list | tuple):
        yield f"list {len(value)}".encode()
        for each in value:
            yield from _contents(each)
    elif isinstance(value, Enum):
        yield str(value).encode()
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        yield repr(value).encode()
    elif hasattr(value, "tensor"):  # SGLang's pointer to a tensor in shared memory
        yield from _contents(value.tensor)
    else:
        raise _UnreadableError(f"media in a {type(value).__name__}")
