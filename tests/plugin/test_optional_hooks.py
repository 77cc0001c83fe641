"""Optional hooks are installed once, call SGLang's functions and add only what they should."""

import subprocess
import sys

import pytest

SCRIPT = """
import pkgutil
from types import SimpleNamespace

from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.plugins.hook_registry import HookRegistry
from memkv_sglang.plugin import hooks, state, storage_hooks

targets = [hook.target for hook in hooks.optional_hooks()]
hooks.install_optional_hooks()
first = [pkgutil.resolve_name(target) for target in targets]
hooks.install_optional_hooks()
assert first == [pkgutil.resolve_name(target) for target in targets]
assert all(len(HookRegistry._hooks[target]) == 1 for target in targets)
assert all(hooks.is_installed(hook) for hook in hooks.optional_hooks())
assert hooks.can_withhold()

class Tree:
    class tree_core:
        @staticmethod
        def take_events():
            return ["of the tree"]

take = UnifiedRadixCache.take_events
assert take(Tree()) == ["of the tree"]

class Storage:
    events = []
    batches = []
    def take_events(self):
        return self.events
    def differs_by_rank(self, pool):
        return pool == "mamba"
    def record_batch(self, batch):
        self.batches.append(batch)

state.storage = Storage()
assert take(Tree()) == ["of the tree"]
state.storage.events = ["of the tiers"]
assert take(Tree()) == ["of the tree", "of the tiers"]

returned = storage_hooks.process_result(lambda *args: args, "scheduler", "batch", "result")
assert returned == ("scheduler", "batch", "result")
assert Storage.batches == ["batch"]

should_back_up = pkgutil.resolve_name(hooks.CONTROLLER).should_backup
controller = SimpleNamespace(backup_skip=True, storage_backend_type="dynamic")
assert should_back_up(controller, SimpleNamespace(name="mamba")) is True
assert should_back_up(controller, SimpleNamespace(name="indexer")) is False
"""


@pytest.mark.soak
def test_optional_hooks_wrap_sglangs_functions() -> None:
    """Runs in its own process, because installed hooks stay for the life of a process."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_server_does_not_import_prometheus_before_sglang_has_set_it_up() -> None:
    """SGLang's metrics of several processes need a variable that is read at the import."""
    modules = ("client.client", "plugin.traffic", "plugin.pools", "plugin.staging", "agent.log")
    script = "import sys\n" + "\n".join(f"import memkv_sglang.{name}" for name in modules)
    script += "\nassert 'prometheus_client' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
