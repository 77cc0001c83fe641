"""The tier in this scheduler process, for hooks that have no other way to it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memkv_sglang.plugin.storage import MemKVStorage

enabled = False
"""Whether the server was started with the tier; the same on all ranks, also where it is off."""

storage: "MemKVStorage | None" = None
"""None while the tier is off here. (SGLang may wrap its backend, so that it cannot be asked.)"""


def wanted() -> bool:
    """Tell whether this server is to have the tier, before its storage has been made."""
    from sglang.srt.runtime_context import get_memory

    from memkv_sglang.plugin.page_size import is_ours

    return is_ours(get_memory())
