"""The demo's final output and its JSON file."""

import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from memkv_testbed.demo.figures import Figures
from memkv_testbed.demo.model import DESCRIPTION
from memkv_testbed.demo.record import Request

CLAIMS = {
    "identical_text": "every answer equals that of a server without any cache",
    "reuse_page_exact": "every request reused exactly the pages it could",
    "changed_token_isolated": "one changed token: nothing after it was reused",
    "tenant_isolated": "same text from another tenant: nothing was reused",
    "every_source_seen": "MinIO, NVMe, host pool and top tier each served a prefix",
}


def describe_setup(page_size: int) -> dict[str, Any]:
    """Return the setup of the measurements."""
    return {
        "model": DESCRIPTION,
        "page_size": page_size,
        "cores": len(os.sched_getaffinity(0)),
        "sglang": importlib.metadata.version("sglang"),
        "router": importlib.metadata.version("sglang-router"),
        "measured": "medians, after every server answered short warm-up prompts",
    }


def one_line(setup: dict[str, Any]) -> str:
    """Return the setup in one line of text."""
    return (
        f"SGLang {setup['sglang']} on {setup['cores']} CPU cores; pages of {setup['page_size']} "
        f"tokens; {setup['model']}"
    )


def print_claims(console: Console, figures: Figures) -> None:
    """Print whether each claim holds."""
    for name, claim in CLAIMS.items():
        mark = Text("✓ ", "bold green") if figures[name] else Text("✗ ", "bold red")
        console.print(mark + Text(claim), highlight=False)


def print_legend(console: Console) -> None:
    """Print an explanation of the table."""
    console.print(
        "on: A* is node A, chosen by the router. xN: median of N requests. no cache: the same "
        "prompt on a server without any cache. Tokens that appear in no column were computed.",
        style="dim",
        highlight=False,
    )


def write_json(
    path: Path, figures: Figures, requests: Sequence[Request], setup: dict[str, Any], seconds: float
) -> None:
    """Write figures, requests and setup to `path`. Raises `OSError`."""
    document = {
        "figures": figures,
        "requests": [request.as_json() for request in requests],
        "setup": setup,
        "seconds": round(seconds, 1),
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
