"""Children of a server that begin as copies of it, instead of importing everything anew.

SGLang spawns its schedulers and its detokenizer, as CUDA demands. On a plain CPU each then takes
as long to import SGLang as the server itself; a fork has it all. Only where it is asked for: a
fork copies one thread alone, and a process that uses `sglang.Engine` may have others.
"""

import multiprocessing
import os
from typing import Any

VARIABLE = "SGLANG_CPU_PLATFORM_FORK"
"""Set to 1, servers fork. `sglang_cpu_platform.server.launch` does."""


def is_wanted() -> bool:
    """Tell whether the environment asks for it."""
    return os.getenv(VARIABLE) == "1"


def fork_children(result: Any, _server_args: Any) -> Any:
    """Run after `_set_envs_and_config`, which sets the start method for all that follows."""
    multiprocessing.set_start_method("fork", force=True)
    return result
