"""No order of updates, sessions, requests, backups and flushes mixes pages of different weights.

The hooks wrap SGLang's real weight updater; its model runner and cache are fakes. In this test
weights are a text, and a page is the text of the weights that computed it.
"""

from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

pytest.importorskip("torch", reason="needs an environment with SGLang 0.5.23")

import torch
import torch.distributed as dist
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

from memkv_sglang.plugin import state, weights
from memkv_sglang.plugin.fingerprint import NoFingerprintError
from memkv_sglang.plugin.namespaces import ModelIdentity

START = ModelIdentity("files one", "", {})
FILES = ["files one", "files two"]
TENSORS = {"a part of the files": {"a"}}


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "identify_weights", lambda path: path)
        patch.setattr(weights, "find_weights", lambda path: path)
        patch.setattr(weights, "tensor_names", lambda path: TENSORS.get(path, {"a", "b"}))
        patch.setattr(weights, "POLL_SECONDS", 0)
        patch.setattr(torch, "get_device_module", lambda: torch.cpu)
        patch.setattr(state, "weight_updates", state.WeightUpdates())
        yield
    dist.destroy_process_group()


class Storage:
    """The part of the storage that the hooks use, and its pages by namespace."""

    pages: dict[tuple[str, str], set[str]]

    def __init__(self, pages: dict[tuple[str, str], set[str]], model: ModelIdentity) -> None:
        self.pages, self.model, self.is_sealed = pages, model, False

    def seal(self) -> None:
        self.is_sealed = True

    def unseal(self, model: ModelIdentity) -> None:
        self.model, self.is_sealed = model, False

    def stored(self) -> set[str]:
        return self.pages.setdefault((self.model.fingerprint, self.model.revision), set())


class WeightUpdater(SchedulerWeightUpdaterManager):  # type: ignore[misc] # untyped
    """SGLang's own weight updater, in the process group of this test."""

    def __post_init__(self) -> None:
        self.tp_cpu_group = dist.group.WORLD

    def _assert_weight_cache_inactive(self, op: str) -> None:
        pass


class Server:
    """A fake of SGLang's model runner, cache and scheduler, with the real weight updater."""

    def __init__(self, keeps_weights: bool = False) -> None:
        self.lost = count()
        self.loaded = START.fingerprint
        self.tree: set[str] = set()
        self.in_flight = 0
        self.is_busy = False
        self.outcome = "whole"
        self.updater = WeightUpdater(
            tp_worker=self,
            draft_worker=None,
            memory_saver_adapter=self,
            flush_cache=self.flush_cache,
            is_fully_idle=lambda ignore_waiting: not self.is_busy,
            scheduler=self,
        )
        self.server_args = SimpleNamespace(
            model_path=START.fingerprint, enable_weights_cpu_backup=keeps_weights
        )

    @property
    def has_session(self) -> bool:
        return self.updater._session is not None

    # Of SGLang's scheduler and radix tree:

    @property
    def tree_cache(self) -> "Server":
        return self

    ongoing_write_through = ongoing_load_back = ()

    @property
    def ongoing_backup(self) -> list[int]:
        return [0] * self.in_flight

    def check_hicache_events(self) -> None:
        self.in_flight = max(self.in_flight - 1, 0)

    def flush_cache(self, empty_cache: bool = True) -> bool:
        if self.is_busy or self.in_flight:
            return False
        weights.reset_tree(lambda tree: tree.tree.clear(), self)
        return True

    def record_weight_version_change(self, new_version: str | None) -> None:
        pass

    _engine_paused = False
    disaggregation_mode = None

    # Of SGLang's memory saver:

    enabled = True

    def pause(self, tag: str) -> None:
        if tag == "weights" and not self.server_args.enable_weights_cpu_backup:
            self.loaded = f"lost {next(self.lost)}"
        if tag == "kv_cache":
            self.tree = {f"lost {next(self.lost)}" for _ in self.tree}

    def resume(self, tag: str) -> None:
        pass

    # Of SGLang's model worker, and its runner's `weight_updater`:

    @property
    def weight_updater(self) -> "Server":
        return self

    model_runner = model = property(lambda self: self)

    def named_buffers(self) -> tuple[()]:
        return ()

    def weight_update_runners(self) -> list[tuple[str, "Server"]]:
        return [("target", self)]

    def deserialize_own_rank(self, tensors: str) -> str:
        return tensors

    def update_weights_from_disk(self, path: str, *_: Any, **__: Any) -> tuple[bool, str]:
        return self._change(path)

    def update_weights_from_tensor(self, named_tensors: str, **_: Any) -> tuple[bool, str]:
        return self._change(named_tensors)

    def begin_weight_update(self) -> None:
        pass

    def end_weight_update(self, run_post_load: bool) -> None:
        self.loaded += " finished"

    def _change(self, content: str) -> tuple[bool, str]:
        """Load all, some or none of the weights, as `outcome` says."""
        changes = {"whole": content, "part": f"part of {content}"}
        self.loaded = changes.get(self.outcome, self.loaded)
        return self.outcome == "whole", ""


def update(server: Server, kind: str, request: Any) -> Any:
    """Call SGLang's function of this name through its hook."""
    server.outcome = getattr(request, "outcome", "whole")
    original = getattr(SchedulerWeightUpdaterManager, kind)
    return getattr(weights, kind)(original, server.updater, request)


def make_request(outcome: str = "whole", *, flush: bool, **fields: Any) -> Any:
    """Return a request with every field that SGLang reads."""
    return SimpleNamespace(
        outcome=outcome,
        flush_cache=flush,
        torch_empty_cache=False,
        weight_version=None,
        load_format=None,
        recapture_cuda_graph=False,
        selector="all",
        **fields,
    )


class Updates(RuleBasedStateMachine):
    @initialize(keeps_weights=st.booleans())
    def start(self, keeps_weights: bool = False) -> None:
        self.names = count()
        self.server = Server(keeps_weights)
        self.pages: dict[tuple[str, str], set[str]] = {}
        state.weight_updates = state.WeightUpdates()
        state.enabled = True
        state.storage = self.storage = Storage(self.pages, START)  # type: ignore[assignment] # a fake

    def teardown(self) -> None:
        state.enabled, state.storage = False, None

    outcomes = st.sampled_from(["whole", "whole", "part", "none"])

    @rule(outcome=outcomes, flush=st.booleans(), path=st.sampled_from(FILES))
    def update_from_files(self, outcome: str, flush: bool, path: str) -> None:
        request = make_request(outcome, flush=flush, model_path=path)
        update(self.server, "update_weights_from_disk", request)

    @rule(outcome=outcomes, flush=st.booleans())
    def update_from_tensors(self, outcome: str, flush: bool) -> None:
        tensors = f"tensors {next(self.names)}"
        request = make_request(outcome, flush=flush, serialized_named_tensors=tensors)
        update(self.server, "update_weights_from_tensor", request)

    @rule()
    def begin_session(self) -> None:
        update(self.server, "begin_weight_update", make_request(flush=False))

    @rule()
    def end_session(self) -> None:
        update(self.server, "end_weight_update", make_request(flush=False))

    @precondition(lambda self: not self.server.is_busy)
    @rule(tags=st.sets(st.sampled_from(["weights", "kv_cache"])))
    def release_memory(self, tags: set[str]) -> None:
        update(self.server, "release_memory_occupation", SimpleNamespace(tags=sorted(tags)))

    @rule(every=st.booleans())
    def take_memory_back(self, every: bool) -> None:
        released = sorted(self.server.updater.offload_tags)
        for tag in released if every else released[:1]:
            update(self.server, "resume_memory_occupation", SimpleNamespace(tags=[tag]))

    @rule()
    def write_weights_remotely(self) -> None:
        """Change weights by RDMA; SGLang notices when the session ends."""
        if self.server.has_session:
            self.server.loaded = f"written {next(self.names)}"

    @rule(is_stored_later=st.booleans())
    def serve(self, is_stored_later: bool) -> None:
        """Load stored pages, compute the rest, and store the pages of the tree."""
        if not self.storage.is_sealed:
            assert self.storage.stored() <= {self.server.loaded}
            self.server.tree |= self.storage.stored()
        self.server.tree.add(self.server.loaded)
        if not self.storage.is_sealed and not is_stored_later:
            self.storage.stored().update(self.server.tree)

    @rule(pages=st.integers(1, 3))
    def begin_backups(self, pages: int) -> None:
        self.server.in_flight += pages

    @rule()
    def start_requests(self) -> None:
        self.server.is_busy = True

    @rule()
    def finish_requests_and_flush(self) -> None:
        self.server.is_busy, self.server.in_flight = False, 0
        self.server.flush_cache()

    @precondition(lambda self: not self.server.is_busy and not self.server.in_flight)
    @rule()
    def attach_again(self) -> None:
        """Detach and attach again; the tree keeps its pages, which are then stored."""
        state.storage = None
        try:
            self.storage = Storage(self.pages, weights.identify_loaded(START))
        except NoFingerprintError:
            self.storage.seal()  # off
        state.storage = self.storage  # type: ignore[assignment] # a fake

    @invariant()
    def namespace_has_pages_of_one_content(self) -> None:
        for (fingerprint, revision), pages in self.pages.items():
            assert len(pages) <= 1
            assert revision or pages <= {fingerprint}

    @invariant()
    def settled_storage_is_not_sealed(self) -> None:
        if state.weight_updates.settled is not None and state.storage is self.storage:  # type: ignore[comparison-overlap] # a fake
            assert not self.storage.is_sealed


TestUpdates = Updates.TestCase
TestUpdates.settings = settings(max_examples=200, stateful_step_count=40)


def test_partial_weight_files_get_a_unique_name() -> None:
    """The other tensors keep their old values, which may differ on another server."""
    server, state.weight_updates = Server(), state.WeightUpdates()
    state.enabled = True
    try:
        for path in ("a part of the files", "files two"):
            request = make_request(flush=True, model_path=path)
            update(server, "update_weights_from_disk", request)
            assert state.weight_updates.settled is not None
            assert (state.weight_updates.settled.fingerprint == path) == (path in FILES)
    finally:
        state.enabled = False


def test_updates_without_the_tier_are_unchanged_and_a_later_attach_is_refused() -> None:
    server, state.weight_updates = Server(), state.WeightUpdates()
    state.enabled = False
    server.in_flight = 1
    request = make_request(flush=False, model_path=FILES[1])
    assert update(server, "update_weights_from_disk", request).success
    assert server.in_flight == 1
    with pytest.raises(NoFingerprintError, match="start the server with --enable-memkv"):
        weights.identify_loaded(START)


@pytest.mark.parametrize("keeps_weights", [True, False])
def test_released_memory_keeps_the_storage_sealed_until_it_is_whole_again(
    keeps_weights: bool,
) -> None:
    machine = Updates()
    machine.start(keeps_weights)
    machine.serve(is_stored_later=False)
    machine.release_memory(set())
    assert machine.storage.is_sealed
    machine.take_memory_back(every=False)
    assert machine.storage.is_sealed
    machine.take_memory_back(every=True)
    assert machine.storage.is_sealed == (not keeps_weights)
    machine.update_from_files("whole", flush=True, path=FILES[0])
    assert not machine.storage.is_sealed
    assert machine.storage.model == START
    machine.teardown()


@pytest.fixture
def machine() -> Iterator[Updates]:
    machine = Updates()
    machine.start()
    yield machine
    machine.teardown()


def test_storage_uses_a_new_namespace_after_a_session(machine: Updates) -> None:
    machine.begin_session()
    assert machine.storage.is_sealed
    machine.end_session()
    assert not machine.storage.is_sealed
    assert machine.storage.model.revision


def test_an_update_waits_for_backups(machine: Updates) -> None:
    """Otherwise SGLang would refuse to flush and serve old pages with the new weights."""
    machine.begin_backups(3)
    machine.serve(is_stored_later=True)
    machine.update_from_files("whole", flush=True, path=FILES[1])
    assert not machine.server.tree
    assert machine.storage.model == ModelIdentity(FILES[1], "", {})


def test_storage_stays_sealed_after_a_refused_flush_until_the_next(machine: Updates) -> None:
    machine.start_requests()
    machine.update_from_files("whole", flush=True, path=FILES[1])
    assert machine.storage.is_sealed
    machine.finish_requests_and_flush()
    assert not machine.storage.is_sealed
