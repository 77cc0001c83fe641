"""The SGLang plugin: `--enable-memkv`. Without the flag it changes nothing."""


def register() -> None:
    """Register everything with SGLang, which calls this in each process of a server.

    Where SGLang has not all that is needed, only the flag: it then says why the tier is off.
    """
    from memkv_sglang.plugin.hooks import HOOKS, absent_targets, is_called, register_hooks
    from memkv_sglang.plugin.page_size import register_page_size
    from memkv_sglang.plugin.server_args import make_engine_args

    if all(is_called(hook.target) for hook in HOOKS):
        return  # a patched SGLang needs no plugin
    register_hooks()
    if not absent_targets():
        register_page_size()
    from sglang.srt.entrypoints.engine import Engine

    Engine.server_args_class = staticmethod(make_engine_args)
