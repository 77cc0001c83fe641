"""Fixtures of the security tests."""

from pathlib import Path

import pytest
from memkv_testbed.certificates import Authority

from tests.tiers.minio.conftest import OpenTier, admin, open_tier

__all__ = ["OpenTier", "admin", "open_tier"]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")
