"""Send the demo's requests to the nodes, in order, and record the results."""

from collections.abc import Callable
from dataclasses import replace

from sglang_cpu_platform.client import Answer, Client
from sglang_cpu_platform.server import CpuServer

from memkv_testbed.demo.cluster import Cluster
from memkv_testbed.demo.node import LoadedPages, Node, wait_until
from memkv_testbed.demo.prompts import History, Script, Tokens, change_token
from memkv_testbed.demo.record import Reference, Request, Sources

ANSWER_TOKENS = 16
REPEATS = 3
TURNS = 3

TENANT = "tenant-2"
WARM_UP = "warm-up"
COUNT_SECONDS = 10.0

CHANGED_STEP = "one token changed"
TENANT_STEP = "tenant 2, same text"


class Scenario:
    """Runs the requests on a cluster. Raises `DemoError` and the client's errors."""

    def __init__(
        self,
        cluster: Cluster,
        script: Script,
        set_status: Callable[[str], None],
        show: Callable[[list[Request]], None],
    ) -> None:
        """Send requests to `cluster`. Calls `show` with all requests whenever one changes."""
        self._cluster = cluster
        self._script = script
        self._set_status = set_status
        self._show = show
        self._by_name = {node.name: node for node in cluster.nodes}
        self.page_size = cluster.nodes[0].page_size
        self._history = History(self.page_size)
        self.requests: list[Request] = []

    def run(self) -> list[Request]:
        """Send all requests; return their results, with the references."""
        self._warm_up_nodes()
        opening = self._converse()
        first = self._by_name[self.requests[0].node]
        other = next(node for node in self._cluster.nodes if node is not first)
        self._repeat("turn 1 again", other, opening)
        self._ask(TENANT_STEP, opening, first, tenant=TENANT)
        self._ask("turn 1, evicted", opening, first)
        self._repeat("tenant 2, moved", other, opening, times=2, tenant=TENANT, flush=True)
        self._repeat("turn 1, flushed", other, opening, times=1, flush=True)
        changed = change_token(opening, self._script.changed_position)
        self._repeat(CHANGED_STEP, other, changed, times=1, flush=True)
        self._set_status(
            f"restarting node {first.name}; starting a server without any cache for comparison"
        )
        reference = self._cluster.restart(first)
        for server in (first.server, reference):
            self._warm_up(server, 0)
        self._repeat("turn 1, restart", first, opening, flush=True)
        self._compare(reference)
        reference.kill()
        return self.requests

    def _converse(self) -> Tokens:
        """Send the conversation through the router; return the first turn's prompt."""
        opening = prompt = self._script.opening()
        for turn in range(1, TURNS + 1):
            request = self._ask(f"turn {turn}", prompt)
            prompt = [*prompt, *request.output_ids, *self._script.follow_up(turn + 1)]
        return opening

    def _repeat(
        self,
        step: str,
        node: Node,
        prompt: Tokens,
        *,
        times: int = REPEATS,
        tenant: str | None = None,
        flush: bool = False,
    ) -> None:
        """Send a prompt several times. With `flush`, empty the node's memory pools first."""
        for _ in range(times):
            if flush:
                node.server.client.flush_cache()
            self._ask(step, prompt, node, tenant=tenant)

    def _ask(
        self, step: str, prompt: Tokens, node: Node | None = None, *, tenant: str | None = None
    ) -> Request:
        """Send a prompt to a node, or to the router, which chooses one."""
        where = f"node {node.name}" if node else "the router"
        self._set_status(f"{step}: {len(prompt):,} tokens to {where}")
        nodes = self._cluster.nodes
        client = node.server.client if node else self._cluster.router.client
        answered = [each.requests() for each in nodes]
        loaded = [each.loaded_pages() for each in nodes]
        spilled = [each.spilled_pages() for each in nodes]
        expected = self._history.reusable(tenant, prompt)
        answer = client.generate(prompt, max_new_tokens=ANSWER_TOKENS, cache_salt=tenant)
        chosen = self._answering_node(answered)
        node = nodes[chosen]
        reused = self._sources(answer, loaded[chosen], node.loaded_pages())
        request = Request(
            step=step,
            node=node.name,
            via="router" if client is self._cluster.router.client else "direct",
            tenant=tenant,
            prompt=prompt,
            output_ids=answer.output_ids,
            ttft_s=answer.ttft_s,
            reported=answer.cached_tokens,
            reused=reused,
            expected=expected,
        )
        self.requests.append(request)
        self._show(self.requests)
        sequence = [*prompt, *answer.output_ids[:-1]]
        self._history.add(tenant, sequence)
        new_pages = len(sequence) // self.page_size - answer.cached_tokens // self.page_size
        node.wait_for_spill(spilled[chosen] + new_pages)
        return request

    def _sources(self, answer: Answer, before: LoadedPages, after: LoadedPages) -> Sources:
        """Return how many of the tokens from storage came from each tier, by the agent's counters.

        The NVMe counter is an upper bound, because the agent also reads its NVMe for uploads.
        """
        storage = answer.cached_by_source.get("storage", 0)
        minio = (after.minio - before.minio) * self.page_size
        return Sources(
            answer.cached_by_source.get("device", 0),
            answer.cached_by_source.get("host", 0),
            min(storage - minio, (after.nvme - before.nvme) * self.page_size),
            minio,
        )

    def _answering_node(self, before: list[int]) -> int:
        """Return the index of the node whose request counter has increased."""
        nodes = self._cluster.nodes

        def chosen() -> list[int]:
            return [i for i, node in enumerate(nodes) if node.requests() > before[i]]

        wait_until(lambda: bool(chosen()), COUNT_SECONDS, "no node has counted the request")
        return chosen()[0]

    def _warm_up_nodes(self) -> None:
        """Let each node compute, spill and load a short prompt."""
        self._set_status("warming up both nodes with short prompts")
        nodes = self._cluster.nodes
        for number, node in enumerate(nodes):
            pages = node.spilled_pages() + self._warm_up(node.server, number) // self.page_size
            node.wait_for_spill(pages)
            for other in nodes:
                if other is not node:
                    self._warm_up(other.server, number)

    def _warm_up(self, server: CpuServer, number: int) -> int:
        """Send a short prompt; return how many tokens now have KV."""
        prompt = self._script.warm_up(number)
        answer = server.client.generate(prompt, max_new_tokens=2, cache_salt=WARM_UP)
        return len(prompt) + len(answer.output_ids) - 1

    def _compare(self, server: CpuServer) -> None:
        """Send every prompt once to a server without any cache."""
        answers: dict[tuple[int, ...], Reference] = {}
        for index, request in enumerate(self.requests):
            key = tuple(request.prompt)
            if key not in answers:
                self._set_status(
                    f"{request.step}: recomputing {len(key):,} tokens without any cache"
                )
                answers[key] = self._recompute(server.client, request.prompt)
            self.requests[index] = replace(request, reference=answers[key])
            self._show(self.requests)

    def _recompute(self, client: Client, prompt: Tokens) -> Reference:
        answer = client.generate(prompt, max_new_tokens=ANSWER_TOKENS)
        return Reference(answer.ttft_s, answer.output_ids)
