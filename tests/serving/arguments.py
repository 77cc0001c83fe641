"""Print as JSON what SGLang makes of command lines; run as a separate process.

The argument is a JSON list of questions; each answer is a line. A question consists of
command lines and of names of further SGLang functions that the tier requires; one that does not
exist simulates an unsupported version.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
from typing import Any

SHOWN = (
    "page_size",
    "enable_hierarchical_cache",
    "hicache_storage_backend",
    "hicache_storage_backend_extra_config",
    "hicache_mem_layout",
    "disaggregation_decode_enable_offload_kvcache",
)


def outcome(argv: list[str]) -> dict[str, Any]:
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import prepare_server_args

    printed, logged, code, shown = io.StringIO(), io.StringIO(), 0, {}
    handler = logging.StreamHandler(logged)
    logging.getLogger("memkv_sglang").addHandler(handler)
    try:
        with contextlib.redirect_stderr(printed):
            arguments = prepare_server_args(argv)
            arguments.resolve_once()
        view = resolved_view(arguments)
        shown = {name: getattr(view, name) for name in SHOWN}
    except SystemExit as end:
        code = int(str(end.code))
    finally:
        logging.getLogger("memkv_sglang").removeHandler(handler)
    return {"code": code, "stderr": printed.getvalue(), "log": logged.getvalue(), **shown}


def answer(argvs: list[list[str]], targets: list[str]) -> None:
    from sglang.srt.plugins import load_plugins

    from memkv_sglang.plugin import hooks

    for target in targets:
        hooks.HOOKS += (hooks.Hook(target, "weights.reset_tree"),)
    load_plugins()
    logging.getLogger("memkv_sglang").setLevel(logging.INFO)
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    outcomes = [outcome(argv) for argv in argvs]
    print(json.dumps({"help": parser.format_help(), "outcomes": outcomes}), flush=True)


def main() -> None:
    questions = json.loads(sys.argv[1])
    import sglang.srt.server_args  # noqa: F401 (once, before the forks)

    for question in questions:
        child = os.fork()
        if not child:
            answer(*question)
            return
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
