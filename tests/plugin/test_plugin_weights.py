"""Any order of updates, sessions, requests, backups and flushes: no page of other weights.

The hooks stand around a model of SGLang: weights are a text, a page is the text of the weights
that computed it.
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

import torch.distributed as dist

from memkv_sglang.plugin import state as running
from memkv_sglang.plugin import weights
from memkv_sglang.plugin.fingerprint import NoFingerprintError
from memkv_sglang.plugin.namespaces import ModelIdentity

Done = SimpleNamespace
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
        patch.setattr(weights, "_updates", weights.WeightUpdates())
        yield
    dist.destroy_process_group()


class Storage:
    """What the hooks use of the storage class, and what it holds by namespace."""

    pages: dict[tuple[str, str], set[str]]

    def __init__(self, pages: dict[tuple[str, str], set[str]], model: ModelIdentity) -> None:
        self.pages, self.model, self.is_sealed = pages, model, False

    def seal(self) -> None:
        self.is_sealed = True

    def unseal(self, model: ModelIdentity) -> None:
        self.model, self.is_sealed = model, False

    def stored(self) -> set[str]:
        return self.pages.setdefault((self.model.fingerprint, self.model.revision), set())


class Server:
    """SGLang as far as weights and pages go."""

    def __init__(self) -> None:
        self.loaded = START.fingerprint
        self.tree: set[str] = set()
        self.in_flight = 0
        self.is_busy = False
        self._session: str | None = None
        self.tp_cpu_group = dist.group.WORLD
        arguments = SimpleNamespace(model_path=START.fingerprint)
        self.scheduler = SimpleNamespace(tree_cache=self, server_args=arguments)

    ongoing_write_through = ongoing_load_back = ()

    @property
    def ongoing_backup(self) -> list[int]:
        return [0] * self.in_flight

    def check_hicache_events(self) -> None:
        self.in_flight = max(self.in_flight - 1, 0)

    def flush_cache(self) -> bool:
        if self.is_busy or self.in_flight:
            return False
        weights.reset_tree(lambda tree: tree.tree.clear(), self)
        return True

    def change(self, content: str, request: Any) -> Any:
        """Load weights as `request` says: wholly, in part, or not at all."""
        self.loaded = {"whole": content, "part": f"part of {content}"}.get(
            request.outcome, self.loaded
        )
        success = request.outcome == "whole"
        if success and request.flush_cache:
            success = self.flush_cache()
        return Done(success=success)


class Updates(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.names = count()
        self.server = Server()
        self.pages: dict[tuple[str, str], set[str]] = {}
        weights._updates = weights.WeightUpdates()
        running.enabled = True
        running.storage = self.storage = Storage(self.pages, START)  # type: ignore[assignment] # a model of it

    def teardown(self) -> None:
        running.enabled, running.storage = False, None

    request = st.builds(
        lambda outcome, flush: SimpleNamespace(outcome=outcome, flush_cache=flush),
        st.sampled_from(["whole", "whole", "part", "none"]),
        st.booleans(),
    )

    @rule(request=request, path=st.sampled_from(FILES))
    def update_from_files(self, request: Any, path: str) -> None:
        request.model_path = path
        weights.update_weights_from_disk(
            lambda server, r: server.change(r.model_path, r), self.server, request
        )

    @rule(request=request)
    def update_from_tensors(self, request: Any) -> None:
        weights.update_weights_from_tensor(
            lambda server, r: (
                server.change(f"tensors {next(self.names)}", r)
                if server._session
                else Done(success=False)
            ),
            self.server,
            request,
        )

    @rule()
    def begin_session(self) -> None:
        def begin(server: Server, _: Any) -> Any:
            if server._session:
                return Done(success=False)
            server._session = "open"
            return Done(success=True)

        weights.begin_weight_update(begin, self.server, None)

    @rule()
    def end_session(self) -> None:
        def end(server: Server, _: Any) -> Any:
            if not server._session:
                return Done(success=False)
            server._session = None
            server.loaded += f" finished {next(self.names)}"
            return Done(success=True)

        weights.end_weight_update(end, self.server, None)

    @rule()
    def write_weights_from_afar(self) -> None:
        """What nobody tells SGLang before the session ends."""
        if self.server._session:
            self.server.loaded = f"written {next(self.names)}"

    @rule(is_stored_later=st.booleans())
    def answer(self, is_stored_later: bool) -> None:
        """Load what there is, compute the rest, store what the tree holds."""
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
    def requests_come(self) -> None:
        self.server.is_busy = True

    @rule()
    def requests_have_gone_and_the_cache_is_flushed(self) -> None:
        self.server.is_busy, self.server.in_flight = False, 0
        self.server.flush_cache()

    @precondition(lambda self: not self.server.is_busy and not self.server.in_flight)
    @rule()
    def attach_again(self) -> None:
        """Detach and attach; the tree stays as it is, and its pages are stored."""
        running.storage = None
        try:
            self.storage = Storage(self.pages, weights.identify_loaded(START))
        except NoFingerprintError:
            self.storage.seal()  # off
        running.storage = self.storage  # type: ignore[assignment] # a model of it

    @invariant()
    def a_namespace_has_the_pages_of_one_content(self) -> None:
        for (fingerprint, revision), pages in self.pages.items():
            assert len(pages) <= 1
            assert revision or pages <= {fingerprint}

    @invariant()
    def what_is_settled_and_flushed_is_not_sealed(self) -> None:
        if weights._updates.settled is not None and self.storage is running.storage:
            assert not self.storage.is_sealed


TestUpdates = Updates.TestCase
TestUpdates.settings = settings(max_examples=200, stateful_step_count=40)


def test_files_that_hold_a_part_of_the_weights_name_nobody() -> None:
    """The other part is what this server had before, which another one may not have had."""
    server, weights._updates = Server(), weights.WeightUpdates()
    running.enabled = True
    try:
        for path in ("a part of the files", "files two"):
            request = SimpleNamespace(outcome="whole", flush_cache=True, model_path=path)
            weights.update_weights_from_disk(
                lambda s, r: s.change(r.model_path, r), server, request
            )
            assert weights._updates.settled is not None
            assert (weights._updates.settled.fingerprint == path) == (path in FILES)
    finally:
        running.enabled = False


def test_without_the_tier_an_update_is_left_alone_and_a_later_attach_refused() -> None:
    server, weights._updates = Server(), weights.WeightUpdates()
    running.enabled = False
    server.in_flight = 1
    request = SimpleNamespace(outcome="whole", flush_cache=False, model_path=FILES[1])
    weights.update_weights_from_disk(lambda s, r: s.change(r.model_path, r), server, request)
    assert server.in_flight == 1
    with pytest.raises(NoFingerprintError, match="start the server with --enable-memkv"):
        weights.identify_loaded(START)


@pytest.fixture
def machine() -> Iterator[Updates]:
    machine = Updates()
    machine.start()
    yield machine
    machine.teardown()


def test_a_session_that_has_ended_goes_on_in_a_new_namespace(machine: Updates) -> None:
    machine.begin_session()
    assert machine.storage.is_sealed
    machine.end_session()
    assert not machine.storage.is_sealed
    assert machine.storage.model.revision


def test_an_update_waits_for_backups(machine: Updates) -> None:
    """Else SGLang would refuse to flush, and serve old pages with the new weights."""
    machine.begin_backups(3)
    machine.answer(is_stored_later=True)
    request = SimpleNamespace(outcome="whole", flush_cache=True)
    machine.update_from_files(request, FILES[1])
    assert not machine.server.tree
    assert machine.storage.model == ModelIdentity(FILES[1], "", {})


def test_a_refused_flush_leaves_the_storage_sealed_until_the_next(machine: Updates) -> None:
    machine.requests_come()
    machine.update_from_files(SimpleNamespace(outcome="whole", flush_cache=True), FILES[1])
    assert machine.storage.is_sealed
    machine.requests_have_gone_and_the_cache_is_flushed()
    assert not machine.storage.is_sealed
