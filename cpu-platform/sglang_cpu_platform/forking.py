"""Fork a server's child processes, so that they do not import SGLang again.

SGLang spawns its schedulers and its detokenizer because CUDA requires it. Each takes as long to
import SGLang as the server itself. Forking is optional: a fork copies only one thread, and a
process that uses `sglang.Engine` may have others.
"""

import multiprocessing
import os
from typing import Any

VARIABLE = "SGLANG_CPU_PLATFORM_FORK"
"""Environment variable. Servers fork if it is 1, which `sglang_cpu_platform.server.launch` sets."""


def is_enabled() -> bool:
    """Return whether the environment enables forking."""
    return os.getenv(VARIABLE) == "1"


def fork_children(result: Any, _server_args: Any) -> Any:
    """Run after `_set_envs_and_config`, which sets the start method of later processes."""
    multiprocessing.set_start_method("fork", force=True)
    return result
