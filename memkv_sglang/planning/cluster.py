"""Simulate a cluster: sessions, replicas, tiers and the links between them."""

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from memkv_sglang.engine.load_balance import GAIN, STEPS
from memkv_sglang.engine.promotion import Admission
from memkv_sglang.page import PageKey
from memkv_sglang.planning.disk import NAMESPACE, SimulatedDisk, page_hash
from memkv_sglang.planning.events import EventLoop
from memkv_sglang.planning.fabric import Fabric
from memkv_sglang.planning.gpu import Job, Replica
from memkv_sglang.planning.pool import LruPool
from memkv_sglang.planning.router import Sticky, make_router
from memkv_sglang.planning.scenario import Scenario
from memkv_sglang.planning.storage import Routes, amplification, build_links
from memkv_sglang.planning.traces import read_trace
from memkv_sglang.planning.workload import Population, Session, SteadySession, Template, Think, Turn

TIERS = ("device", "host", "nvme", "minio", "computed")
_SPEED_WEIGHT = 0.2
"""Weight of the newest load in a tier's moving average of speed."""
_HOT_SESSION = 1 << 40


class Served(msgspec.Struct, frozen=True):
    """A request that was answered."""

    arrived: float
    first_token: float
    """Seconds from arrival to the first token."""
    node: int
    tokens: int
    hot: bool = False


class Result(msgspec.Struct, frozen=True):
    """The results of a simulation without its warm-up, and all its inputs."""

    scenario: Scenario
    requests: int
    waiting: int
    """Number of requests that had no first token when the simulation ended."""
    first_token_p50: float
    first_token_p95: float
    first_token_p99: float
    hits: dict[str, float]
    """Share of prompt pages by source: a tier, or recomputed."""
    use: dict[str, float]
    """Utilization of each resource. If it belongs to a node, that of the busiest node."""
    bottleneck: str
    loaded_bytes_per_s: dict[str, float]
    """Bytes per second of the whole cluster, by tier."""
    spilled_bytes_per_s: float
    uploaded_bytes_per_s: float
    heads_per_s: float
    """HEADs of lookups, of the whole cluster."""
    nvme_writes_per_day: float
    """Bytes written per day to a node's disk, relative to its rated endurance."""
    bucket_bytes: float
    served: list[Served] = []

    def summary(self) -> dict[str, Any]:
        """Return all results except the individual requests."""
        content: dict[str, Any] = msgspec.to_builtins(self)
        del content["served"]
        return content


@dataclass(eq=False)
class _Node:
    """One GPU node."""

    routes: Routes
    disk: SimulatedDisk
    admission: Admission
    speeds: dict[str, float] = field(default_factory=dict)
    """Bytes per second of recent loads, by tier."""


@dataclass(eq=False)
class _Worker:
    """One replica with its pools."""

    node: int
    replica: Replica
    device: LruPool
    host: LruPool
    jobs: int = 0
    """Number of requests assigned and not yet answered."""


@dataclass(eq=False)
class _Request:
    """A request in flight."""

    session: int
    turn: Turn
    arrived: float
    worker: _Worker
    parts: dict[str, int] = field(default_factory=dict)
    """Number of the prompt's pages by tier."""
    loads: int = 0
    hot: bool = False


class Cluster:
    """The cluster that a scenario describes. Call `run` once."""

    def __init__(self, scenario: Scenario, templates: Sequence[Template] = ()) -> None:
        """Build nodes, links and sessions. `templates` are needed for the agentic workload."""
        self._s = s = scenario
        self._loop = EventLoop()
        self._fabric = Fabric(self._loop, s.quantum)
        routes = build_links(self._fabric, s)
        page, run = s.page_bytes, s.run_pages
        self._nodes = [
            _Node(each, SimulatedDisk(int(s.nvme_bytes / page), run), Admission(s.promote))
            for each in routes
        ]
        self._workers = [
            _Worker(
                node,
                Replica(self._loop, s.prefill, s.step, s.device_tokens),
                LruPool(s.device_tokens / s.page_tokens, run),
                LruPool(int(s.host_bytes / s.replicas / page), run),
            )
            for node in range(s.nodes)
            for _ in range(s.replicas)
        ]
        capacity = s.shared_bytes / amplification(s).puts if s.servers else 0.0
        self._bucket = LruPool(capacity / page, run)
        self._router = make_router(s, self._workers, self._estimate)
        self._population = self._make_population(templates)
        self._numbers = itertools.count()
        self._served: list[Served] = []
        self._pages: Counter[str] = Counter()
        self._in_flight = 0
        self._spilled = self._uploaded = self._heads = 0.0

    def _make_population(self, templates: Sequence[Template]) -> Population | None:
        if self._s.workload != "agentic":
            return None
        return Population(templates, self._s.seed, scale=self._s.think_scale, run=self._s.run_pages)

    def run(
        self, *, keep_requests: bool = False, tell: Callable[[float], None] | None = None
    ) -> Result:
        """Run the simulation; call `tell` from time to time with the completed fraction."""
        s = self._s
        for number in range(s.sessions):
            self._open(number)
        if s.restart_at:
            self._loop.at(s.restart_at, self._restart)
        if s.hot_prompt_at:
            self._loop.at(s.hot_prompt_at, self._send_hot_prompt)
        end = s.warm_up + s.seconds
        self._loop.run(s.warm_up)
        before = self._counters()
        for step in range(1, 21):
            self._loop.run(s.warm_up + s.seconds * step / 20)
            if tell is not None:
                tell(self._loop.now / end)
        return self._result(before, keep_requests=keep_requests)

    # Sessions

    def _open(self, number: int) -> None:
        """Begin a session midway. Its earlier pages are already in the pools."""
        session: Session = self._population.running() if self._population else self._steady(number)
        if before := session.before():
            worker = self._workers[self._router.choose(number, before)]
            self._remember(worker, before, 0)
            self._bucket.store(before.runs, before.pages)
        self._think(number, iter(session))

    def _steady(self, number: int) -> SteadySession:
        s = self._s
        return SteadySession(
            number,
            s.seed,
            context=s.context,
            new=s.new_tokens,
            output=s.output_tokens,
            think=Think(s.think.median * s.think_scale, s.think.mean * s.think_scale),
            page_tokens=s.page_tokens,
            run=s.run_pages,
        )

    def _think(self, number: int, turns: Iterator[Turn]) -> None:
        turn = next(turns, None)
        if turn is None:
            if isinstance(self._router, Sticky):
                self._router.forget(number)
            assert self._population is not None
            number, turns = self._s.sessions + next(self._numbers), iter(self._population.new())
            turn = next(turns)
        self._loop.after(turn.think, partial(self._arrive, number, turns, turn))

    def _arrive(self, number: int, turns: Iterator[Turn], turn: Turn) -> None:
        worker = self._workers[self._router.choose(number, turn)]
        request = _Request(number, turn, self._loop.now, worker)
        worker.jobs += 1
        self._in_flight += 1
        self._look_up(request, partial(self._think, number, turns))

    # A request

    def _look_up(self, request: _Request, then: Callable[[], None]) -> None:
        """Find out which tier holds each page, and load the pages that are not on the device."""
        parts, seconds = self._split(request.worker, request.turn)
        node = self._nodes[request.worker.node]
        if parts["nvme"]:
            node.disk.lookup(request.turn.runs, request.turn.pages)  # a lookup counts as a use
        if self._s.balance_loads:
            self._balance(request.turn, parts, node)
        self._drop_slow_loads(request, parts, node)
        request.parts = parts
        self._pages.update(parts)
        loads = [(tier, parts[tier]) for tier in ("host", "nvme", "minio") if parts[tier]]
        request.loads = len(loads)
        if not loads:
            self._loop.after(seconds, partial(self._compute, request, then))
        for tier, pages in loads:
            self._loop.after(seconds, partial(self._load, request, tier, pages, then))

    def _split(self, worker: _Worker, turn: Turn) -> tuple[dict[str, int], float]:
        """Return the number of pages by tier, and the seconds that the lookup takes."""
        runs, pages = turn.runs, turn.pages
        usable = min(pages, (turn.tokens - 1) // self._s.page_tokens)
        device = min(worker.device.lookup(runs, pages), usable)
        host = max(device, min(worker.host.lookup(runs, pages), usable))
        nvme = minio = 0
        seconds = 0.0
        if host < usable:
            nvme, minio = self._stored(worker.node, turn, host, usable)
            if self._s.servers and nvme < usable - host:
                seconds = self._s.lookup_seconds
                self._heads += self._s.heads_per_lookup
        return {
            "device": device,
            "host": host - device,
            "nvme": nvme,
            "minio": minio,
            "computed": pages - host - nvme - minio,
        }, seconds

    def _stored(self, node: int, turn: Turn, start: int, end: int) -> tuple[int, int]:
        """Return how many pages to load from disk and from the bucket, starting at page `start`.

        Stops at the first page that neither has. The disk is preferred, as in `Loader.load`.
        """
        disk, bucket, full = self._nodes[node].disk, self._bucket, self._s.run_pages
        near = far = 0
        for i in range(start // full, len(turn.runs)):
            skipped = max(0, start - i * full)
            wanted = min(full, end - i * full)
            if wanted <= skipped:
                break
            run = turn.runs[i]
            here = max(min(disk.size(run), wanted), skipped)
            there = max(min(bucket.size(run), wanted), here)
            near, far = near + here - skipped, far + there - here
            if there < wanted:
                break
        return near, far

    def _balance(self, turn: Turn, parts: dict[str, int], node: _Node) -> None:
        """Move pages from the disk's part to the bucket's, like `engine.balance_loads`."""
        s, page = self._s, self._s.page_bytes
        if not parts["nvme"] or not s.servers:
            return
        stored = self._bucket.lookup(turn.runs, turn.pages)
        most = min(parts["nvme"], stored - parts["device"] - parts["host"] - parts["minio"])
        near = self._fabric.bytes_left(node.routes.read) / page
        far = self._fabric.bytes_left(node.routes.get) / page

        def seconds(moved: int) -> float:
            left, loaded = parts["nvme"] - moved, parts["minio"] + moved
            return max(
                (near + left) * page / s.nvme_read if left else 0.0,
                (far + loaded) * page / s.nic if loaded else 0.0,
            )

        counts = [parts["nvme"] * step // STEPS for step in range(1, STEPS + 1)]
        best = min((count for count in counts if count <= most), key=seconds, default=0)
        if seconds(best) <= GAIN * seconds(0):
            parts["nvme"] -= best
            parts["minio"] += best

    def _drop_slow_loads(self, request: _Request, parts: dict[str, int], node: _Node) -> None:
        """Recompute pages that would take longer to load, like `engine.skip_slow_loads`."""
        if not self._s.skip_slow_loads:
            return
        s = self._s
        for tier in ("minio", "nvme"):
            speed = node.speeds.get(tier)
            if not parts[tier] or speed is None:
                continue
            known = (parts["device"] + parts["host"]) * s.page_tokens
            known += parts["nvme"] * s.page_tokens if tier == "minio" else 0
            saved = s.prefill.marginal(parts[tier] * s.page_tokens, known)
            if parts[tier] * s.page_bytes / speed > saved:
                # Old measurements lose weight, so that a slow minute does not disable a tier for
                # good.
                node.speeds[tier] = speed * 1.2
                parts["computed"] += parts[tier]
                parts[tier] = 0

    def _load(self, request: _Request, tier: str, pages: int, then: Callable[[], None]) -> None:
        node = self._nodes[request.worker.node]
        routes = {"host": node.routes.host, "nvme": node.routes.read, "minio": node.routes.get}
        route = node.routes.hot if request.hot and tier == "minio" else routes[tier]
        size, began = pages * self._s.page_bytes, self._loop.now

        def loaded() -> None:
            speed = size / max(self._loop.now - began, 1e-9)
            before = node.speeds.get(tier, speed)
            node.speeds[tier] = before + _SPEED_WEIGHT * (speed - before)
            request.loads -= 1
            if not request.loads:
                self._compute(request, then)

        self._fabric.send(route, size, loaded)

    def _compute(self, request: _Request, then: Callable[[], None]) -> None:
        turn, parts = request.turn, request.parts
        cached = (turn.pages - parts["computed"]) * self._s.page_tokens
        job = Job(
            new=max(turn.tokens - cached, 1),
            cached=cached,
            output=turn.output,
            first_token=partial(self._answer, request),
            done=partial(self._finish, request, then),
        )
        request.worker.replica.submit(job)

    def _answer(self, request: _Request) -> None:
        """Record the first token, and store the prompt's pages."""
        seconds = self._loop.now - request.arrived
        turn = request.turn
        self._served.append(
            Served(request.arrived, seconds, request.worker.node, turn.tokens, request.hot)
        )
        node = self._nodes[request.worker.node]
        written = self._promote(request, node)
        start = (turn.pages - request.parts["computed"]) // self._s.run_pages
        written += self._remember(request.worker, turn, start)
        if written:
            size = written * self._s.page_bytes
            self._spilled += size
            self._fabric.send(node.routes.write, size, _nothing)
        if self._s.uploads and self._s.servers and request.parts["computed"]:
            missing = turn.pages - self._bucket.lookup(turn.runs, turn.pages)
            if missing:
                stored = partial(self._store_in_bucket, turn, missing)
                self._fabric.send(node.routes.put, missing * self._s.page_bytes, stored)

    def _store_in_bucket(self, turn: Turn, pages: int) -> None:
        self._uploaded += pages * self._s.page_bytes
        self._bucket.store(turn.runs, turn.pages)

    def _promote(self, request: _Request, node: _Node) -> int:
        """Copy runs that were loaded from the bucket to the disk; return their number of pages."""
        pages = request.parts["minio"]
        if not pages or not self._s.nvme_bytes:
            return 0
        turn, run = request.turn, self._s.run_pages
        end = -(-(turn.pages - request.parts["computed"]) // run)
        missing = [i for i in range(end) if not node.disk.size(turn.runs[i])]
        admitted = [
            turn.runs[i]
            for i in missing
            if node.admission.admits(PageKey(NAMESPACE, page_hash(turn.runs[i])))
        ]
        return node.disk.spill(admitted) if admitted else 0

    def _remember(self, worker: _Worker, turn: Turn, start: int) -> int:
        """Store a chain in the pools, and its runs from number `start` on on the disk.

        Returns the number of pages written to the disk.
        """
        worker.device.store(turn.runs, turn.pages)
        worker.host.store(turn.runs, turn.pages)
        if not self._s.nvme_bytes:
            return 0
        return self._nodes[worker.node].disk.spill(turn.runs, turn.pages, start)

    def _finish(self, request: _Request, then: Callable[[], None]) -> None:
        request.worker.jobs -= 1
        self._in_flight -= 1
        then()

    # Events

    def _restart(self) -> None:
        for worker in self._workers:
            worker.device.clear()
            worker.host.clear()

    def _send_hot_prompt(self) -> None:
        s = self._s
        pages = s.hot_prompt_tokens // s.page_tokens
        runs = [-(1 << 50) - i for i in range(-(-pages // s.run_pages))]
        self._bucket.store(runs, pages)
        turn = Turn(0.0, runs, pages, s.hot_prompt_tokens + s.new_tokens, s.output_tokens)
        for worker in self._workers:
            request = _Request(_HOT_SESSION, turn, self._loop.now, worker, hot=True)
            worker.jobs += 1
            self._in_flight += 1
            self._look_up(request, _nothing)

    def _estimate(self, worker_number: int, turn: Turn) -> float:
        """Estimate the time to first token on a worker, for `TierAware`."""
        s, worker = self._s, self._workers[worker_number]
        node = self._nodes[worker.node]
        parts, _ = self._split(worker, turn)
        slow = {"nvme": s.nvme_read, "minio": s.nic}
        loads = [
            parts[tier] * s.page_bytes / node.speeds.get(tier, rate) for tier, rate in slow.items()
        ]
        cached = (turn.pages - parts["computed"]) * s.page_tokens
        compute = s.prefill.seconds(max(turn.tokens - cached, 1), cached)
        return worker.replica.wait + max(loads) + compute

    # Results

    def _counters(self) -> dict[str, Any]:
        fabric = self._fabric
        return {
            "requests": len(self._served),
            "pages": Counter(self._pages),
            "use": fabric.use_by_link(),
            "spilled": self._spilled,
            "uploaded": self._uploaded,
            "heads": self._heads,
            "loaded": {
                tier: sum(fabric.bytes_moved(getattr(node.routes, route)) for node in self._nodes)
                for tier, route in (("host", "host"), ("nvme", "read"), ("minio", "get"))
            },
            "GPU prefill": [worker.replica.prefill_seconds for worker in self._workers],
            "GPU memory": [worker.replica.memory_seconds for worker in self._workers],
        }

    def _result(self, before: dict[str, Any], *, keep_requests: bool) -> Result:
        s, after = self._s, self._counters()
        served = self._served[before["requests"] :]
        times = sorted(one.first_token for one in served) or [0.0]
        pages = after["pages"] - before["pages"]
        total = max(pages.total(), 1)
        use = self._uses(before, after)
        per_second = {
            tier: (after["loaded"][tier] - before["loaded"][tier]) / s.seconds
            for tier in after["loaded"]
        }
        spilled = (after["spilled"] - before["spilled"]) / s.seconds
        daily = spilled / s.nodes * 86_400
        return Result(
            scenario=s,
            requests=len(served),
            waiting=self._in_flight,
            first_token_p50=statistics.median(times),
            first_token_p95=times[int(0.95 * (len(times) - 1))],
            first_token_p99=times[int(0.99 * (len(times) - 1))],
            hits={tier: pages[tier] / total for tier in TIERS},
            use=use,
            bottleneck=max(use, key=use.__getitem__),
            loaded_bytes_per_s=per_second,
            spilled_bytes_per_s=spilled,
            uploaded_bytes_per_s=(after["uploaded"] - before["uploaded"]) / s.seconds,
            heads_per_s=(after["heads"] - before["heads"]) / s.seconds,
            nvme_writes_per_day=daily / s.nvme_drive_bytes_per_day if s.nvme_bytes else 0.0,
            bucket_bytes=self._bucket.held * s.page_bytes,
            served=self._served if keep_requests else [],
        )

    def _uses(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
        """Return the utilization of every resource."""
        s = self._s
        use: dict[str, float] = {}
        for link, taken in after["use"].items():
            name = link.split(" ", 2)[2] if link.startswith("node ") else link
            if link.startswith("server") and not s.servers:
                continue
            name = f"node {name}" if link.startswith("node ") else name
            value = (taken - before["use"][link]) / s.seconds
            use[name] = max(use.get(name, 0.0), value)
        if s.servers:
            heads = (after["heads"] - before["heads"]) * s.head_server_cpu / s.seconds
            use["server CPU"] += heads / (s.servers * s.server_cores)
        # Decode is not counted: while any request runs, it takes all the time that prefill leaves.
        for name in ("GPU prefill", "GPU memory"):
            busy = max(b - a for a, b in zip(before[name], after[name], strict=True))
            use[name] = busy / s.seconds
        return use


def _nothing() -> None:
    pass


def simulate(
    scenario: Scenario,
    templates: Sequence[Template] = (),
    *,
    keep_requests: bool = False,
    tell: Callable[[float], None] | None = None,
) -> Result:
    """Simulate a scenario. The same scenario always gives the same result."""
    return Cluster(scenario, templates).run(keep_requests=keep_requests, tell=tell)


def agentic_templates(file: Path) -> Sequence[Template]:
    """Return the sessions of a trace of coding agents. Raises `ConfigError`."""
    return [template for template in read_trace(file).sessions if template.turns]
