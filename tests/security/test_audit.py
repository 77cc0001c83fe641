"""The dependency audit: how it evaluates pip-audit's report."""

import runpy
from pathlib import Path
from typing import Any

import pytest

verdict = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "audit.py"))["verdict"]

GOOD = {"name": "good", "version": "1.0", "vulns": []}
BAD = {
    "name": "bad",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}, {"id": "PYSEC-2", "fix_versions": []}],
}
UNKNOWN = {"name": "unknown", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("dependencies", "status", "lines"),
    [
        ([GOOD], 0, ["audit: no known vulnerability in 1 packages"]),
        (
            [GOOD, BAD],
            1,
            [
                "audit: bad 1.0: PYSEC-1, fixed in 1.1",
                "audit: bad 1.0: PYSEC-2, fixed in no version yet",
            ],
        ),
        (
            [UNKNOWN] * 2,
            0,
            ["audit: skipped, the vulnerability service cannot be reached"],
        ),
        (
            [BAD, UNKNOWN],
            1,
            [
                "audit: bad 1.0: PYSEC-1, fixed in 1.1",
                "audit: bad 1.0: PYSEC-2, fixed in no version yet",
                "audit: the service does not know 1 of the packages",
            ],
        ),
    ],
)
def test_only_known_vulnerabilities_fail(
    dependencies: list[dict[str, Any]], status: int, lines: list[str]
) -> None:
    assert verdict(dependencies) == (status, lines)
