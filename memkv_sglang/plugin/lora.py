"""LoRA by content: the same adapter shares pages everywhere, another of the same name nowhere.

SGLang seeds page hashes with an adapter's id: a digest of name and path for adapters given at
start, a random number for later ones. The first would let other content meet under one hash, the
second would never share. The content's digest takes the id's place.
"""

import logging
import uuid
from collections.abc import Callable
from typing import Any

from memkv_sglang.plugin import state as running
from memkv_sglang.plugin.fingerprint import NoFingerprintError
from memkv_sglang.plugin.namespaces import identify_weights

log = logging.getLogger(__name__)

DIGEST_LENGTH = 32
"""Hexadecimal digits, as in SGLang's own ids."""

_digests: dict[str, str] = {}
"""Content digest by adapter id, of this process."""


def load_adapter(original: Callable[..., Any], manager: Any, adapter: Any) -> Any:
    """Stand around `LoRAManager._load_lora_adapter`, through which those of the start come too."""
    result = original(manager, adapter)
    if running.wanted():
        _digests[adapter.lora_id] = _digest(adapter.lora_path)
    return result


def init_request(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> None:
    """Stand around `Req.__init__`, which appends the adapter's id to the request's extra key."""
    original(request, *args, **kwargs)
    digest = _digests.get(request.lora_id)
    if digest and request.extra_key and request.extra_key.endswith(request.lora_id):
        request.extra_key = request.extra_key.removesuffix(request.lora_id) + digest


def _digest(path: str) -> str:
    try:
        return identify_weights(path)[:DIGEST_LENGTH]
    except (NoFingerprintError, OSError) as error:
        log.warning("memkv: adapter without a fingerprint (%s); its pages are not shared", error)
        return uuid.uuid4().hex
