"""The weights that a name on the hub stands for, and the properties that separate namespaces."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from memkv_sglang.plugin import attachment, device_pools, state
from memkv_sglang.plugin.fingerprint import NoFingerprintError, fingerprint
from memkv_sglang.plugin.namespaces import (
    COORDINATES,
    SPLIT_OVER_CONTEXT_RANKS,
    STORAGE_CONFIG,
    describe_pool,
    identify_weights,
)
from tests.plugin import host_pools
from tests.plugin.attached import MODEL, storage_config
from tests.sglang_versions import IS_NEWEST, since_0_5_23

NAME = "some/model"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Downloads of two revisions, in the layout of the hub's cache."""
    repository = tmp_path / "models--some--model"
    for commit, branch, content in (("1" * 40, "main", b"one"), ("2" * 40, "tuned", b"two")):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot / "pytorch_model.bin").write_bytes(content)
        reference = repository / "refs" / branch
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(commit)
    return tmp_path


def test_a_revision_stands_for_its_downloaded_model(cache: Path) -> None:
    snapshots = cache / "models--some--model" / "snapshots"
    assert identify_weights(NAME, cache=str(cache)) == fingerprint(snapshots / ("1" * 40))
    tuned = identify_weights(NAME, "tuned", str(cache))
    assert tuned == fingerprint(snapshots / ("2" * 40))
    assert tuned != identify_weights(NAME, "main", str(cache))


@pytest.mark.parametrize(("name", "revision"), [(NAME, "gone"), ("no/such", None), ("no such", "")])
def test_a_missing_download_has_no_fingerprint(
    cache: Path, name: str, revision: str | None
) -> None:
    with pytest.raises(NoFingerprintError, match="is not a local model"):
        identify_weights(name, revision, str(cache))


def digest(
    pool: Any = None, model: Any = MODEL, device: tuple[Any, ...] = (), **ranks: Any
) -> bytes:
    pool = pool or host_pools.mha()
    return describe_pool("kv", pool, device, 4096, storage_config(**ranks), model).digest


def device_mha(dtype: torch.dtype) -> Any:
    """Return SGLang's device pool for KV of this type."""
    return MHATokenToKVPool(
        size=64,
        page_size=16,
        dtype=dtype,
        head_num=2,
        head_dim=32,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
    )


def device_mla(dtype: torch.dtype) -> Any:
    """Return SGLang's device pool for latent KV of this type."""
    return MLATokenToKVPool(
        size=64,
        page_size=16,
        dtype=dtype,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
    )


CHANGES: dict[str, Callable[[], bytes]] = {
    "weights": lambda: digest(model=MODEL._replace(fingerprint="other")),
    "revision of the weights": lambda: digest(model=MODEL._replace(revision="updated")),
    "model's element type": lambda: digest(model=MODEL._replace(details={"dtype": "bfloat16"})),
    "KV's element type": lambda: digest(of_type(torch.float8_e5m2)),
    "layout": lambda: digest(host_pools.mha("page_first_direct")),
    "kind of pool": lambda: digest(host_pools.mla()),
    "layout of the device's buffers": lambda: digest(
        device=(SimpleNamespace(kv_cache_layout="hnd"),)
    ),
    "packed draft": lambda: digest(device=(SimpleNamespace(), SimpleNamespace())),
    "tensor rank": lambda: digest(tp_rank=1, tp_size=2),
    "tensor ranks": lambda: digest(tp_size=2),
    "pipeline stage": lambda: digest(pp_rank=1, pp_size=2),
    "context rank": lambda: digest(attn_cp_rank=1, attn_cp_size=2),
}


def of_type(dtype: torch.dtype) -> Any:
    pool = host_pools.mha()
    return SimpleNamespace(**{**vars(pool), "dtype": dtype})


@pytest.mark.usefixtures("process")
def test_any_difference_is_another_namespace() -> None:
    digests = {"nothing": digest(), **{name: change() for name, change in CHANGES.items()}}
    assert len(set(digests.values())) == len(digests)
    assert digest() == digests["nothing"]


@pytest.mark.usefixtures("process")
def test_ranks_with_equal_latent_pages_share_them() -> None:
    """Also under DCP, which splits a page over the DCP ranks: tensor ranks 1 and 3 of 4 hold the
    same half of it.
    """

    def latent(**ranks: Any) -> bytes:
        return digest(host_pools.mla(), is_mla_model=True, **ranks)

    assert latent(tp_rank=1, tp_size=2) == latent()
    contexts = {"tp_size": 2, "attn_cp_size": 2}
    assert latent(tp_rank=1, attn_cp_rank=1, **contexts) == latent(**contexts) == latent()
    for argument in SPLIT_OVER_CONTEXT_RANKS:
        split = MODEL._replace(details={argument: "True"})
        first, second = (
            latent(model=split, tp_rank=i, attn_cp_rank=i, **contexts) for i in range(2)
        )
        assert first != second
    if not attachment.names_dcp_ranks():
        return
    halves = {"tp_size": 4, "dcp_size": 2, "logical_page_size": 2 * host_pools.PAGE}
    first, second, third, fourth = (latent(tp_rank=i, dcp_rank=i % 2, **halves) for i in range(4))
    assert first == third != second == fourth


EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz)


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("make", [device_mha, device_mla])
def test_formats_that_sglang_stores_as_the_same_type_are_kept_apart(
    make: Callable[[torch.dtype], Any],
) -> None:
    devices = [make(dtype) for dtype in EIGHT_BITS]
    assert {device.store_dtype for device in devices} == {torch.uint8}
    assert len({digest(device=(device,)) for device in devices}) == len(EIGHT_BITS)
    assert digest(device=(make(torch.float8_e5m2),)) == digest(device=(devices[1],))


@since_0_5_23
def test_every_part_of_sglangs_own_namespace_is_named() -> None:
    from sglang.srt.mem_cache.hicache_key_scheme import KVCacheNamespace

    assert set(KVCacheNamespace.__struct_fields__) == set(COORDINATES)


def test_every_field_of_the_storage_config_is_named_or_has_a_reason_not_to_be() -> None:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    fields = {field.name for field in dataclasses.fields(HiCacheStorageConfig)}
    assert fields == set(STORAGE_CONFIG) if IS_NEWEST else fields < set(STORAGE_CONFIG)


@pytest.mark.usefixtures("process")
def test_the_only_pool_of_a_decode_server_that_offloads_has_a_known_format() -> None:
    """Its controller has a host pool instead of a group of them."""
    device = device_mha(torch.float32)
    controller = SimpleNamespace(mem_pool_host=host_pools.mha(), mem_pool_device=device)
    device_pools.attach(lambda controller: None, controller)
    assert state.device_pools == {"kv": (device,)}
