"""A patched SGLang, with and without this package. Each import takes seconds, so there are two."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.patching.patched_copy import environment_of, make_patched_copy

Run = Callable[..., subprocess.CompletedProcess[str]]

WITH_THE_PLUGIN = """
import json
from sglang.srt.plugins import load_plugins
load_plugins()
from memkv_sglang.plugin.flags import CONFIG, ENABLE, EVERYDAY, SETTINGS
from memkv_sglang.plugin.hooks import HOOKS, missing_hooks
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs, prepare_server_args
fields = {ENABLE, CONFIG, SETTINGS, *(flag.name for flag in EVERYDAY)}
print(json.dumps({
    "not called": missing_hooks(),
    "hooked twice": [hook.target for hook in HOOKS if hook.target in HookRegistry._hooks],
    "own engine": Engine.server_args_class is ServerArgs,
    "no fields": sorted(fields - set(ServerArgs.__struct_fields__)),
    "settings": prepare_server_args(
        ["--model-path", "x", "--memkv-endpoint", "http://a", "--memkv-minio-bucket", "pages"]
    ).memkv_settings,
}))
prepare_server_args(["--model-path", "x", "--enable-memkv", "--disable-radix-cache"])
"""

WITHOUT_THE_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "memkv_sglang":
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Absent())
from sglang.srt.server_args import prepare_server_args
print(prepare_server_args(["--model-path", "x"]).hicache_storage_backend)
prepare_server_args(["--model-path", "x", "--enable-memkv"])
"""


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run a program on a patched copy."""
    with tempfile.TemporaryDirectory(prefix="memkv-") as directory:
        environment = {**os.environ, **environment_of(make_patched_copy(Path(directory)))}

        def run(program: str, plugins: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-c", program],
                env={**environment, "SGLANG_PLUGINS": plugins},
                capture_output=True,
                text=True,
                check=False,
            )

        yield run


@pytest.fixture(scope="module")
def result(run: Run) -> subprocess.CompletedProcess[str]:
    return run(WITH_THE_PLUGIN, plugins="memkv")


@pytest.fixture(scope="module")
def report(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout or "{}")
    assert found, result.stderr
    return found


def test_the_series_has_every_hook_and_flag(report: dict[str, Any]) -> None:
    """If this fails, the plugin has new hooks or flags: add them as patches/README.md describes."""
    assert report["not called"] == []
    assert report["no fields"] == []


def test_every_flag_reaches_the_server_arguments(report: dict[str, Any]) -> None:
    assert report["settings"] == {"minio.endpoint": "http://a", "minio.bucket": "pages"}


def test_the_plugin_leaves_a_patched_sglang_alone(report: dict[str, Any]) -> None:
    assert report["hooked twice"] == []
    assert report["own engine"]


def test_bad_settings_exit_with_one_line(
    result: subprocess.CompletedProcess[str],
) -> None:
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: --disable-radix-cache: ")


@pytest.mark.soak
def test_without_the_package_a_patched_sglang_behaves_as_before(run: Run) -> None:
    result = run(WITHOUT_THE_PACKAGE, plugins="none")
    assert result.stdout.splitlines() == ["None"], result.stderr
    assert "unrecognized arguments: --enable-memkv" in result.stderr
