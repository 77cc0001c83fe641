"""`python -m memkv_sglang.agent LOCK`: an agent for a program that starts it; see `launch`.

Configuration as JSON on stdin, the outcome as a line on stdout, logs on stderr. `LOCK` is the
descriptor that holds the lock on the socket's directory.
"""

import os
import sys


def main() -> None:
    """Leave the starter's process tree, then run."""
    text = sys.stdin.buffer.read()
    # The starter may kill all its descendants at its end; the agent is not to be one of them.
    if os.fork():
        os._exit(0)
    from memkv_sglang.agent.launched import run_launched

    sys.exit(run_launched(text, int(sys.argv[1])))


if __name__ == "__main__":
    main()
