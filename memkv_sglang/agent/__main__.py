"""`python -m memkv_sglang.agent LOCK`: the agent process that `launch` starts.

Reads the configuration as JSON from stdin, writes one line with the outcome to stdout, and logs to
stderr. `LOCK` is an inherited descriptor that holds the lock on the socket's directory.
"""

import os
import sys


def main() -> None:
    """Detach from the starter's process tree, then run the agent."""
    text = sys.stdin.buffer.read()
    # A starter may kill all its descendants when it ends. The agent must survive that.
    if os.fork():
        os._exit(0)
    from memkv_sglang.agent.launched import run_launched

    sys.exit(run_launched(text, int(sys.argv[1])))


if __name__ == "__main__":
    main()
