"""A process killed with SIGKILL during a spill: acknowledged pages are present and correct."""

import subprocess
import sys
from pathlib import Path

import pytest

from memkv_sglang.config.schema import MIB
from memkv_sglang.page import Chain
from memkv_sglang.testing.conformance import load
from memkv_sglang.testing.pages import make_chain, make_namespace
from tests.tiers.nvme.nvme_support import disk, present

BATCH, LENGTHS = 16, (8192, 4096)
ACKNOWLEDGED_BEFORE_KILL = 40

SPILLER = f"""
import sys, time
from memkv_sglang.config.schema import NvmeConfig
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.nvme import NvmeTier

tier = NvmeTier(NvmeConfig(directory=sys.argv[1], capacity={64 * MIB}))
for turn in range(10**6):
    keys = make_chain(make_namespace(), {BATCH}, f"turn {{turn}}").keys()
    pages = [make_page(key, {LENGTHS}, filled=True) for key in keys]
    assert max(tier.spill(pages, time.monotonic() + 60)) == 0
    tier.mark_pending(keys[::2])
    print(turn, flush=True)
"""


def chain(turn: int) -> Chain:
    return make_chain(make_namespace(), BATCH, f"turn {turn}")


@pytest.mark.parametrize("journal", ["kept", "lost"])
def test_kill_during_a_spill(tmp_path: Path, journal: str) -> None:
    """Three kills on one directory, whose capacity is large enough to avoid evictions."""
    directory = tmp_path / "nvme"
    command = [sys.executable, "-c", SPILLER, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as spiller:
        assert spiller.stdout is not None
        for _ in range(ACKNOWLEDGED_BEFORE_KILL):
            assert spiller.stdout.readline()
        spiller.kill()
        acknowledged = ACKNOWLEDGED_BEFORE_KILL + len(spiller.stdout.readlines())
    if journal == "lost":
        (directory / "journal").unlink()
    with disk(directory, capacity=64 * MIB) as nvme:
        for turn in range(acknowledged):
            load(nvme.tier, chain(turn).keys(), LENGTHS)
        if journal == "kept":
            waiting = {page.key for page in nvme.tier.pending()}
            marked = [key for turn in range(acknowledged) for key in chain(turn).keys()[::2]]
            assert waiting.issuperset(marked)
        report = nvme.tier.verify(False, lambda done, total: None)
        assert report.is_clean
        beyond = chain(acknowledged + 1).keys()
        assert not any(present(nvme.tier, beyond))
