"""Times of clears that a node remembers across restarts."""

import logging
from pathlib import Path

import pytest

from memkv_sglang.tiers.minio.hidden import HiddenPages

NAMESPACE = bytes(32)


def test_times_of_clears_survive_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "cleared.json"
    pages = HiddenPages(path)
    assert pages.until(NAMESPACE) == 0.0
    pages.hide(NAMESPACE, 5.0)
    assert HiddenPages(path).until(NAMESPACE) == 5.0
    assert not caplog.records, "a first start has nothing to warn about"


def test_a_damaged_file_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cleared.json"
    path.write_text("{")
    assert HiddenPages(path).until(NAMESPACE) == 0.0
    (record,) = caplog.records
    assert record.message == "cleared pages may be found again"
