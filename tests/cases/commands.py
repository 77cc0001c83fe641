"""Run `memkv` in a clean environment."""

import os
import subprocess
import sys
from typing import Any

PROGRAM = "import sys; from memkv_sglang.cli.main import main; sys.exit(main())"
LIMIT = 60.0


def memkv(
    *arguments: str | bytes, environ: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command with only PATH and `environ` set; invalid UTF-8 in its output is escaped."""
    base = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    options = {"capture_output": True, **options}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**base, **(environ or {})},
        encoding="utf-8",
        errors="backslashreplace",
        timeout=LIMIT,
        check=False,
        **options,
    )


def assert_clean(text: str) -> None:
    """Assert that text has no traceback and no control characters."""
    assert "Traceback" not in text, text
    assert all(char == "\n" or char.isprintable() for char in text), repr(text)
