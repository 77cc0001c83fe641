"""Fail if an old name reappears: each word has one meaning, and each thing one word."""

import re
import subprocess
import sys
from pathlib import Path

OLD_NAMES = {
    r"decline_slow_loads": "engine.skip_slow_loads",
    r"nvme[._-]requests": "nvme.io_engine",
    r"known_pages": "minio.presence_cache_pages",
    r"missing_ttl": "minio.negative_ttl",
    r"agent\.drain\b|AGENT_DRAIN\b|agent-drain\b(?!-)": "agent.drain_timeout",
    r"idle[._-]exit|IDLE_EXIT": "agent.idle_timeout",
    r"breaker[_-]open\b|BREAKER_OPEN\b": "engine.breaker_cooldown",
    r"collector\.lease\b(?! import)|COLLECTOR_LEASE\b": "collector.lease_ttl",
    r"collector-lease\b(?!-)": "--collector-lease-ttl",
    r"\bmemkv version\b": "memkv --version",
    r"declined_pages": "skipped_slow_pages",
    r"memkv-nvme-dir(?!ectory)|memkv_nvme_dir(?!ectory)": "--memkv-nvme-directory",
    r"memkv-bucket|memkv_bucket\b": "--memkv-minio-bucket",
    r"class (Worth|Knowledge|Room|Landed|Valuation|Ghosts|Movers)\b": "see CONTRIBUTING.md, Words",
    r"\bDescriber\b": "NamespacePublisher",
    r"\bNotedPages\b": "AccessTimeCache",
    r"\bToucher\b": "AccessTimeUpdater",
    r"\bplainly_matches\b": "fast_match",
    r"memkv_sglang[./]demo": "memkv_testbed.demo",
    r"tiers[./]minio[./]bulk\b": "tiers/minio/http and tiers/minio/objects",
    r"plugin[./]running\b": "plugin.state",
}
"""Patterns of names that are no longer used, and what to write instead."""

SUFFIXES = {".py", ".pyx", ".pyi", ".md", ".toml", ".json", ".sh", ".yml", ".yaml"}
SKIPPED = ("benchmarks/results/", "locks/", "tools/check_names.py")


def main() -> int:
    """Print each old name with its place; return the exit status."""
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    found = 0
    for name in tracked.stdout.splitlines():
        path = Path(name)
        if path.suffix not in SUFFIXES or name.startswith(SKIPPED) or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            for pattern, new in OLD_NAMES.items():
                if match := re.search(pattern, line):
                    print(f"{name}:{number}: old name {match[0]!r}; write {new}")
                    found += 1
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
