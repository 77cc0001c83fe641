"""Run the trial: each step in a process of its own, with the results of all in one JSON file."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tools.gpu_trial.steps import STEPS, Setting, sglang_sources

LINES = 40
"""Lines of a failed step's output that the result keeps."""


def main() -> int:
    """Return 0 if every step succeeded, 1 if one failed, 2 if the trial cannot run here."""
    options = make_parser().parse_args()
    if options.child:
        return _run_here(options)
    if problem := _missing(options.device):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": options.device,
        "quick": options.quick,
        "steps": {},
    }
    for name in options.only or STEPS:
        print(f"== {name}", flush=True)
        result["steps"][name] = one = _run_apart(name, options)
        print(f"== {name}: {'failed' if 'error' in one else 'passed'}, {one['seconds']:.0f} s")
        # After each step, so that a time limit loses only the step that it ends.
        options.result.write_text(json.dumps(result, indent=1) + "\n")
    return int(any("error" in one for one in result["steps"].values()))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="run", description=__doc__)
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="smaller pools, one repetition")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), help="run these steps only")
    parser.add_argument("--directory", type=Path, default="/var/tmp", help="disk to measure")  # noqa: S108
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests the trial itself"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def _missing(device: str) -> str:
    """Return why the trial cannot run here, in one line; "" if it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}); install torch for CUDA"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device; --device cpu tests the trial without one"
    return ""


def _run_apart(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a step in a process of its own, because it may crash and replaces packages."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "step.json"
        command = [sys.executable, "-m", "tools.gpu_trial", str(file), "--child", "--only", name]
        command += ["--device", options.device, "--directory", str(options.directory)]
        command += ["--quick"] * options.quick
        began = time.monotonic()
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        found: dict[str, Any] = {"seconds": time.monotonic() - began}
        if file.exists():
            return found | json.loads(file.read_text())
        print(done.stdout, end="")
        tail = done.stdout.splitlines()[-LINES:]
        return found | {"error": f"exit status {done.returncode}", "output": tail}


def _run_here(options: argparse.Namespace) -> int:
    setting = Setting(options.device, options.directory, sglang_sources(), options.quick)
    (name,) = options.only
    try:
        result: dict[str, Any] = {"result": STEPS[name](setting)}
    except Exception as error:
        traceback.print_exc()
        result = {"error": repr(error), "output": traceback.format_exc().splitlines()[-LINES:]}
    options.result.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
