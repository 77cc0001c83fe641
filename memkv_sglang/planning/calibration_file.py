"""Write a node's own measurements for `memkv plan --calibration`."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from memkv_sglang import __version__
from memkv_sglang.planning.calibration import CpuRow, DiskRow, Machine, Measured, measured

_SOURCE = "memkv bench"


class TierSpeed(NamedTuple):
    """Measurements of one tier at one page size by `memkv bench`."""

    tier: str
    page_bytes: int
    load_bytes_per_s: float
    spill_bytes_per_s: float
    load_cpu_s_per_gb: float
    """CPU time of this process during the loads, per GB."""


def write_calibration(speeds: Sequence[TierSpeed], file: Path) -> None:
    """Write `speeds` to a TOML file.

    All other numbers are the project's, with their sources. These include the CPU use of storage
    servers, which a node cannot measure. Raises `OSError`.
    """
    known = measured()
    disk = [
        DiskRow(one.page_bytes, one.load_bytes_per_s, one.spill_bytes_per_s, _SOURCE)
        for one in speeds
        if one.tier == "nvme"
    ]
    client = [
        CpuRow(one.page_bytes, one.load_cpu_s_per_gb, _SOURCE)
        for one in speeds
        if one.tier == "minio"
    ]
    date = time.strftime("%Y-%m-%d")
    mine = msgspec.structs.replace(
        known,
        machine=Machine(f"{os.uname().nodename}, {os.cpu_count()} cores", date, __version__),
        sources={_SOURCE: f"memkv bench on this machine, {date}", **known.sources},
        disk=disk,
        client_load=client or known.client_load,
    )
    file.write_text(as_toml(mine), "utf-8")


def as_toml(value: Measured) -> str:
    """Return the document as TOML. Strings and numbers have the same form in JSON and TOML."""
    lines = ["# Written by `memkv bench --calibration`. Every number names its source."]
    for name, content in msgspec.to_builtins(value).items():
        for table in content if isinstance(content, list) else [content]:
            lines += ["", f"[[{name}]]" if isinstance(content, list) else f"[{name}]"]
            lines += [f"{json.dumps(key)} = {_inline(item)}" for key, item in table.items()]
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)
