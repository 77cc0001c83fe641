"""Hooks that only watch are in place once, and hand through what SGLang does."""

import subprocess
import sys

SCRIPT = """
from sglang.srt.plugins.hook_registry import HookRegistry
from memkv_sglang.plugin import observers
from memkv_sglang.plugin import state as running
import pkgutil
observers.install()
first = [pkgutil.resolve_name(target) for target, _ in observers.OBSERVERS]
observers.install()
assert first == [pkgutil.resolve_name(target) for target, _ in observers.OBSERVERS]
assert all(len(HookRegistry._hooks[target]) == 1 for target, _ in observers.OBSERVERS)

class Tree:
    class tree_core:
        @staticmethod
        def take_events():
            return ["of the tree"]

take = pkgutil.resolve_name(observers.TREE).take_events
assert take(Tree()) == ["of the tree"]

class Announcer:
    def take(self):
        return ["of the tiers"]

class Storage:
    announcer = None
    def differs_by_rank(self, pool):
        return pool == "mamba"

running.storage = Storage()
assert take(Tree()) == ["of the tree"]
running.storage.announcer = Announcer()
assert take(Tree()) == ["of the tree", "of the tiers"]

class Controller:
    backup_skip = True
    storage_backend_type = "dynamic"

class Transfer:
    name = "mamba"

batches = []
Storage.computed = staticmethod(batches.append)
hand = observers.process_result(lambda *given: given, "scheduler", "batch", "result")
assert hand == ("scheduler", "batch", "result")
assert batches == ["batch"]

asked = pkgutil.resolve_name(observers.CONTROLLER).should_backup
assert asked(Controller(), Transfer()) is True
Transfer.name = "indexer"
assert asked(Controller(), Transfer()) is False
"""


def test_observers_are_put_in_place() -> None:
    """In a process of its own: hooks stay for a process's life."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
