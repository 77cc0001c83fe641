"""The host pool's memory is the project's own, whatever SGLang is told about it."""

import os

import pytest

pytest.importorskip("torch", reason="needs an environment with SGLang 0.5.23")

import torch

from memkv_sglang.plugin import host_memory, state


def test_a_setting_for_hugetlb_pages_is_reported_as_ignored_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(state, "wanted", lambda: True)
    monkeypatch.setenv("SGLANG_HUGEPAGE_SIZE", "2MB")
    host_memory._warn_about_huge_pages.cache_clear()
    for _ in range(2):
        tensor, descriptor, _memory = host_memory.allocate_shared(_unused, (4,), torch.uint8)
        os.close(descriptor)
        assert tensor.tolist() == [0] * 4
    assert caplog.text.count("SGLANG_HUGEPAGE_SIZE is ignored") == 1


def _unused(*_: object) -> None:
    raise AssertionError
