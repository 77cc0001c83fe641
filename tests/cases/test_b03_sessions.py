"""A client that disconnects right before or after its welcome leaves no session behind."""

from pathlib import Path

from memkv_sglang.agent import protocol
from tests.agent.agent_harness import RawClient, eventually, make_config, running_agent


def test_clients_that_disconnect_at_once_leave_no_session(tmp_path: Path) -> None:
    with running_agent(make_config(tmp_path)) as agent:
        for _ in range(50):
            with RawClient(agent.socket) as hasty:
                hasty.send(protocol.Hello(protocol.PROTOCOL_VERSION, b""))
            with RawClient(agent.socket) as hasty:
                hasty.greet()
        with RawClient(agent.socket) as watcher:
            watcher.greet()

            def sessions() -> int:
                report = watcher.ask(protocol.Status())
                assert isinstance(report, protocol.StatusReport)
                return report.agent.sessions

            eventually(lambda: sessions() == 1)
