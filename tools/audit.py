"""Check the locked dependencies for known vulnerabilities with pip-audit; see `make audit`.

Exit with status 1 if a dependency is vulnerable. If the vulnerability service is unreachable, print
one line and succeed, so that a machine without network access can still run `.ci/run`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parents[1] / "locks" / "requirements.txt"

LIMIT = 300.0
"""Seconds for the whole audit."""


def main() -> int:
    """Run pip-audit on the lock file, print its findings and return the exit status."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(LOCK), "--disable-pip"]
    options = ["--require-hashes", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"audit: skipped, the vulnerability service did not answer within {LIMIT:.0f} s")
        return 0
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["pip-audit printed nothing"])[-1]
        print(f"audit: skipped, {reason}")
        return 0
    status, lines = verdict(dependencies)
    print(*lines, sep="\n")
    return status


def verdict(dependencies: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Return the exit status and the lines to print for pip-audit's report."""
    unknown = [each["name"] for each in dependencies if "skip_reason" in each]
    lines = [
        f"audit: {each['name']} {each['version']}: {found['id']}, "
        f"fixed in {', '.join(found['fix_versions']) or 'no version yet'}"
        for each in dependencies
        for found in each.get("vulns", [])
    ]
    status = int(bool(lines))
    checked = len(dependencies) - len(unknown)
    if not checked:
        return 0, ["audit: skipped, the vulnerability service cannot be reached"]
    if unknown:
        lines.append(f"audit: the service does not know {len(unknown)} of the packages")
    if not status:
        lines.append(f"audit: no known vulnerability in {checked} packages")
    return status, lines


if __name__ == "__main__":
    sys.exit(main())
