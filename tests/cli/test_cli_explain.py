"""`memkv explain` on the log of a real agent."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from memkv_testbed.host_pool import HostPool

from memkv_sglang.client.client import AgentClient
from memkv_sglang.engine.recompute import UNKNOWN
from memkv_sglang.engine.served import ServedRequest
from tests.cli.cli_node import PAGE, PAGES, Run, running_agent, spill_chain

PROGRAM = "import sys; from memkv_sglang.cli.main import main; sys.exit(main())"


def serve(agent: AgentClient, request: str) -> None:
    """Look up and load a chain for a request."""
    chain = spill_chain(agent)
    agent.lookup(chain, 5.0, UNKNOWN, request)
    with HostPool(PAGES, PAGE, parts=1) as pool:
        number = agent.register_pool(pool.descriptor, pool.length)
        loads = agent.load(chain, pool.buffers(number, range(PAGES)), ServedRequest(request))
    assert {load.tier for load in loads} == {"nvme"}


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_request_is_explained(
    run: Run, environ: dict[str, str], tmp_path: Path, log_format: str
) -> None:
    environ |= {"MEMKV_AGENT_LOG_FORMAT": log_format, "MEMKV_AGENT_LOG_REQUESTS": "all"}
    log = tmp_path / "run" / "agent.log"
    with running_agent(environ, log) as agent:
        serve(agent, "chosen id")
        log_now = log.read_bytes()
    shown = run("explain", "chosen id").out
    assert "request chosen id waited" in shown
    assert [line.split()[:4] for line in shown.splitlines() if "nvme" in line] == [
        ["nvme", "1", "12", "12"]
    ] * 2
    (explained,) = json.loads(run("explain", "--slowest", "--json").out)
    assert explained["operations"]["load"]["done"] == PAGES
    piped = subprocess.run(
        [sys.executable, "-c", PROGRAM, "explain", "--slowest", "--log", "-"],
        input=log_now,
        capture_output=True,
        check=True,
    )
    assert b"request chosen id waited" in piped.stdout
    if log_format == "json":
        assert all(json.loads(line)["time"] for line in log_now.splitlines())
    missing = run("explain", "another")
    assert (missing.status, missing.err.count("\n")) == (1, 1)
    assert "waited for less than 100 ms" in missing.err


def test_wrong_usage_is_one_line(run: Run, tmp_path: Path) -> None:
    for arguments in ((), ("id", "--slowest")):
        assert run("explain", *arguments).status == 2
    absent = run("explain", "id")
    assert (absent.status, absent.err.count("\n")) == (1, 1)
    assert "--log" in absent.err
    assert "cannot read" in run("explain", "id", "--log", str(tmp_path / "no")).err
