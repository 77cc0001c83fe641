"""The storage names the reason when it cannot work in a server."""

from types import SimpleNamespace
from typing import Any

import pytest

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.plugin import attachment, media
from memkv_sglang.plugin.attachment import UnsuitableServerError, check_server, read_config

DYNAMIC = {"class_name": "MemKVStorage", "interface_v1": 1}


@pytest.fixture(autouse=True)
def _hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "obstacle", str)
    monkeypatch.setattr(attachment, "takes_media", lambda server_args: False)


def server(extra: str | None = None, **arguments: Any) -> Any:
    return SimpleNamespace(
        hicache_storage_backend_extra_config=extra, hicache_storage_backend="dynamic", **arguments
    )


def test_suitable_servers_pass() -> None:
    check_server(DYNAMIC, server(enable_lora=False))
    check_server({}, server())  # a patched SGLang needs no class name
    check_server(DYNAMIC, server('{"backend_name": "memkv"}', enable_lora=True))


def test_a_missing_hook_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "obstacle", lambda: "no sglang.a, sglang.b")
    with pytest.raises(UnsuitableServerError, match=r"no sglang\.a, sglang\.b"):
        check_server(DYNAMIC, server())


def test_media_are_refused_where_two_images_could_share_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(media, "can_identify", lambda: False)
    check_server(DYNAMIC, server())
    monkeypatch.setattr(attachment, "takes_media", lambda server_args: True)
    with pytest.raises(UnsuitableServerError, match=r"by 30 bits.*install sglang==") as caught:
        check_server(DYNAMIC, server())
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(media, "can_identify", lambda: True)
    check_server(DYNAMIC, server())


def test_dcp_is_refused_where_ranks_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "names_dcp_ranks", lambda: False)
    check_server(DYNAMIC, server(dcp_size=1))
    with pytest.raises(UnsuitableServerError, match="drop --dcp-size"):
        check_server(DYNAMIC, server(dcp_size=2))


def test_the_copying_interface_is_refused() -> None:
    with pytest.raises(UnsuitableServerError, match='"interface_v1": 1'):
        check_server({"class_name": "MemKVStorage"}, server())


def test_adapters_loaded_before_the_storage_are_refused() -> None:
    with pytest.raises(UnsuitableServerError, match="--enable-memkv"):
        check_server(DYNAMIC, server(enable_lora=True))


def test_settings_come_from_extra_config_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMKV_MINIO_ENDPOINT", "http://minio:9000")
    monkeypatch.setenv("MEMKV_MINIO_BUCKET", "pages")
    assert read_config({}).minio.endpoint == "http://minio:9000"
    config = read_config({"memkv": {"settings": {"minio.bucket": "others"}}})
    assert (config.minio.endpoint, config.minio.bucket) == ("http://minio:9000", "others")
    with pytest.raises(ConfigError):
        read_config({"memkv": {"settings": {"minio.buckett": "others"}}})
