"""Identify LoRA adapters by content, so that equal adapters share pages and others never do.

SGLang seeds page hashes with an adapter's id. For an adapter given at the start, the id is a digest
of name and path, so different content could get equal hashes. For a later one, it is a random
number, so nodes would never share its pages. The hooks replace the id with a digest of the content.
"""

import logging
import uuid
from collections.abc import Callable
from typing import Any

from memkv_sglang.plugin import state
from memkv_sglang.plugin.fingerprint import NoFingerprintError
from memkv_sglang.plugin.namespaces import identify_weights

log = logging.getLogger(__name__)

DIGEST_LENGTH = 32
"""Number of hexadecimal digits, as in SGLang's own ids."""


def load_adapter(original: Callable[..., Any], manager: Any, adapter: Any) -> Any:
    """Wrap `LoRAManager._load_lora_adapter`, through which every adapter from files goes."""
    result = original(manager, adapter)
    if state.wanted():
        state.adapter_digests[adapter.lora_id] = _digest(adapter.lora_path)
    return result


def init_request(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap `Req.__init__`, which appends the adapter's id to the request's extra key."""
    original(request, *args, **kwargs)
    digest = state.adapter_digests.get(request.lora_id)
    if digest and request.extra_key and request.extra_key.endswith(request.lora_id):
        request.extra_key = request.extra_key.removesuffix(request.lora_id) + digest


def _digest(path: str) -> str:
    try:
        return identify_weights(path)[:DIGEST_LENGTH]
    except (NoFingerprintError, OSError) as error:
        log.warning("memkv: adapter has no fingerprint; its pages are not shared: %s", error)
        return uuid.uuid4().hex
