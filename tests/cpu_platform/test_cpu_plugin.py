"""When the platform is active, and when it is not."""

import importlib.metadata
import logging

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

import torch
from sglang.srt.platforms.interface import SRTPlatform
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_cpu_platform import plugin
from sglang_cpu_platform.platform import PlainCpuPlatform


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the targets that get a hook, so that this process is not hooked."""
    targets: list[str] = []
    monkeypatch.setattr(HookRegistry, "register", lambda target, *_: targets.append(target))
    monkeypatch.setattr(plugin, "_adjust_sglang", lambda: None)
    return targets


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)


def test_both_entry_points_are_found() -> None:
    for group in ("sglang.srt.platforms", "sglang.srt.plugins"):
        (entry,) = importlib.metadata.entry_points(group=group, name="plain_cpu")
        assert callable(entry.load())


@pytest.mark.usefixtures("no_accelerator")
def test_is_active_without_an_accelerator(registered: list[str]) -> None:
    assert plugin.activate() == plugin.PLATFORM
    assert issubclass(PlainCpuPlatform, SRTPlatform)
    plugin.register_hooks()
    assert len(registered) == len(set(registered)) == len(plugin.HOOKS) - 1


def test_is_inactive_with_an_accelerator(
    registered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert plugin.activate() is None
    plugin.register_hooks()
    assert registered == []


@pytest.mark.usefixtures("no_accelerator")
def test_is_inactive_with_sglangs_cpu_engine(
    registered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert plugin.activate() is None
    plugin.register_hooks()
    assert registered == []


@pytest.mark.usefixtures("no_accelerator")
def test_one_missing_target_disables_all_hooks_in_one_line(
    registered: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gone = "sglang.srt.mem_cache.pool_host.mha.NoSuchPool.load"
    hook = plugin.Hook(gone, "pinning.not_pinned", "BEFORE")
    monkeypatch.setattr(plugin, "HOOKS", (*plugin.HOOKS, hook))
    with caplog.at_level(logging.ERROR, logger=plugin.__name__):
        plugin.register_hooks()
    assert registered == []
    (record,) = caplog.records
    assert gone in record.getMessage()
    assert "0.5.23" in record.getMessage()
