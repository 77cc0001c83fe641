"""wrk: the throughput of this MinIO with a client that discards the bytes."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.base import tool

SCRIPT = """\
local paths = {%s}
local at = 0
request = function()
  at = at %% #paths + 1
  return wrk.format("GET", paths[at])
end
"""


def wrk(urls: Sequence[str], connections: int, seconds: int) -> float:
    """Return the GB/s of GETs for the URLs, in sequence on each connection."""
    parts = urlsplit(urls[0])
    paths = ",".join(f'"{urlsplit(url).path}?{urlsplit(url).query}"' for url in urls)
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(SCRIPT % paths)
        script.flush()
        base = f"{parts.scheme}://{parts.netloc}"
        output = _run(Path(script.name), base, connections, seconds)
    if "Non-2xx" in output:
        raise RuntimeError(f"MinIO refused wrk:\n{output}")
    match = re.search(r"Transfer/sec:\s+([\d.]+)(KB|MB|GB)", output)
    assert match is not None, output
    # wrk counts in powers of two, but prints decimal prefixes.
    binary = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}
    return float(match[1]) * binary[match[2]] / 1e9


def _run(script: Path, base: str, connections: int, seconds: int) -> str:
    threads = min(connections, 2)
    options = [f"-t{threads}", f"-c{connections}", f"-d{seconds}s", "-s", str(script)]
    command = [tool("wrk"), *options, base]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
