"""For each layout of ranks that SGLang reports: which ranks can load each other's pages."""

from typing import Any

import pytest

from memkv_sglang.plugin.storage import MemKVStorage
from tests.plugin import host_pools
from tests.plugin.attached import after, keys, store
from tests.plugin.conftest import MakeNode
from tests.sglang_versions import since_0_5_23

LATENT = {"is_mla_model": True}
DCP = {**LATENT, "tp_size": 4, "dcp_size": 2, "logical_page_size": 2 * host_pools.PAGE}

Rank = dict[str, Any]


@pytest.mark.parametrize(
    ("writer", "reader", "shares"),
    [
        # DP attention: SGLang numbers tensor ranks within each attention group.
        ({"tp_size": 2, "dp_rank": 0}, {"tp_size": 2, "dp_rank": 1}, True),
        ({"tp_size": 2, "dp_rank": 0}, {"tp_size": 2, "dp_rank": 1, "tp_rank": 1}, False),
        ({**LATENT, "dp_rank": 1}, {**LATENT, "dp_rank": 0, "tp_rank": 1, "tp_size": 2}, True),
        ({"pp_size": 2}, {"pp_size": 2, "pp_rank": 1}, False),
        ({**LATENT, "pp_size": 2}, {**LATENT, "pp_size": 2, "pp_rank": 1}, False),
        ({"attn_cp_size": 2}, {"attn_cp_size": 2, "attn_cp_rank": 1}, False),
        pytest.param(
            {**DCP, "tp_rank": 1, "dcp_rank": 1},
            {**DCP, "tp_rank": 3, "dcp_rank": 1},
            True,
            marks=since_0_5_23,
        ),
        pytest.param(DCP, {**DCP, "tp_rank": 1, "dcp_rank": 1}, False, marks=since_0_5_23),
    ],
    ids=[
        "data-parallel groups share",
        "their ranks do not",
        "latent KV is the same everywhere",
        "a stage has its own layers",
        "also of latent KV",
        "a context rank has its own tokens",
        "DCP ranks with the same part share",
        "with another part they do not",
    ],
)
def test_which_ranks_load_which_pages(
    make_node: MakeNode, writer: Rank, reader: Rank, shares: bool
) -> None:
    make_pool = host_pools.mla if writer.get("is_mla_model") else host_pools.mha
    node, chain = make_node(minio=None), keys(8)
    pools = make_pool(), make_pool()
    one, other = (
        node.attach({"kv": pool}, **rank)
        for pool, rank in zip(pools, (writer, reader), strict=True)
    )
    contents = store(one, pools[0], chain)
    assert other.batch_exists(chain) == (8 if shares else 0)
    assert loaded(other, pools[1], chain) == (contents if shares else [])


def loaded(storage: MemKVStorage, pool: Any, chain: list[str]) -> list[bytes]:
    """Load without a lookup, as SGLang may; return the results."""
    results = storage.batch_get_v1(chain, host_pools.slots(pool, range(len(chain))), after([]))
    return [host_pools.read(pool, place) for place, result in enumerate(results) if result]
