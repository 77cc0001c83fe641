"""Compare the locked dependencies with the known vulnerabilities, by pip-audit; see `make audit`.

Exit status 1 if one is vulnerable. Where the service that knows cannot be asked, that is one line
and no failure: a machine without it can still run everything else that a change must pass.
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
    """Run pip-audit over the lock file, print what it found."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(LOCK), "--disable-pip"]
    options = ["--require-hashes", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"audit: not done, the service did not answer within {LIMIT:.0f} s")
        return 0
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        print(f"audit: not done, {reason}")
        return 0
    status, lines = verdict(dependencies)
    print(*lines, sep="\n")
    return status


def verdict(dependencies: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Return the exit status and the lines for pip-audit's report."""
    unknown = [each["name"] for each in dependencies if "skip_reason" in each]
    lines = [
        f"audit: {each['name']} {each['version']}: {found['id']}, "
        f"fixed in {', '.join(found['fix_versions']) or 'no version yet'}"
        for each in dependencies
        for found in each.get("vulns", [])
    ]
    status = int(bool(lines))
    asked = len(dependencies) - len(unknown)
    if not asked:
        return 0, ["audit: not done, the service that knows vulnerabilities cannot be reached"]
    if unknown:
        lines.append(f"audit: the service does not know {len(unknown)} of the packages")
    if not status:
        lines.append(f"audit: no known vulnerability in {asked} packages")
    return status, lines


if __name__ == "__main__":
    sys.exit(main())
