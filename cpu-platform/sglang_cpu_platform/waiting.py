"""What the scheduler does while it waits for storage: nothing, so that storage has the core.

SGLang's scheduler polls without a pause while a request's pages are on their way. Where a GPU
computes, the CPU has cores to spare for that; here the poll takes the core that moves the pages.
"""

import os
import time
from collections.abc import Callable
from typing import Any

PAUSE_S = float(os.environ.get("PAUSE_S", "0.0005"))


def pause(original: Callable[..., Any], scheduler: Any) -> Any:
    """Stand around `Scheduler.on_idle`, which is called when there is nothing to compute."""
    done = original(scheduler)
    time.sleep(PAUSE_S)
    return done
