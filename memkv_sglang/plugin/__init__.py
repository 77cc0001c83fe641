"""The SGLang plugin behind `--enable-memkv`. Without that flag, SGLang is unchanged."""


def register() -> None:
    """Register the flags and hooks with SGLang, which calls this in each process of a server.

    If this SGLang lacks a function that a hook needs, registers only the flags. A server that uses
    them then logs why the tier is off.
    """
    from memkv_sglang.plugin.hooks import (
        absent_targets,
        is_patched_in,
        register_hooks,
        required_hooks,
    )
    from memkv_sglang.plugin.model_check import register_model_check
    from memkv_sglang.plugin.page_size import register_page_size
    from memkv_sglang.plugin.server_args import make_engine_args

    if all(is_patched_in(hook.target) for hook in required_hooks()):
        return  # a patched SGLang needs no plugin
    register_hooks()
    if not absent_targets():
        register_page_size()
        register_model_check()
    from sglang.srt.entrypoints.engine import Engine

    Engine.server_args_class = staticmethod(make_engine_args)
