"""The SGLang plugin: `--enable-memkv`. Without the flag it changes nothing."""

import logging

log = logging.getLogger(__name__)


def register() -> None:
    """Register everything with SGLang, which calls this in each process of a server."""
    from memkv_sglang.plugin.hooks import absent_targets, register_hooks
    from memkv_sglang.plugin.page_size import register_page_size
    from memkv_sglang.plugin.server_args import make_engine_args

    absent = absent_targets()
    if absent:
        log.warning("memkv: this SGLang has no %s; the tier cannot be enabled", ", ".join(absent))
        return
    register_hooks()
    register_page_size()
    from sglang.srt.entrypoints.engine import Engine

    Engine.server_args_class = staticmethod(make_engine_args)
