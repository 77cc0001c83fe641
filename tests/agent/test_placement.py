"""Tests of how readily the kernel kills an agent."""

from pathlib import Path

from tests.agent.agent_harness import make_config, running_agent


def test_the_oom_score_is_a_setting(tmp_path: Path) -> None:
    with running_agent(make_config(tmp_path, oom_score_adj=500)) as agent:
        assert Path(f"/proc/{agent.pid}/oom_score_adj").read_text() == "500\n"


def test_without_the_setting_the_score_is_inherited(tmp_path: Path) -> None:
    own = Path("/proc/self/oom_score_adj").read_text()
    with running_agent(make_config(tmp_path)) as agent:
        assert Path(f"/proc/{agent.pid}/oom_score_adj").read_text() == own
