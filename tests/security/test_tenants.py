"""Tenants with different salts can neither load each other's pages nor detect them by timing.

`tests/serving/test_serving_reuse.py` shows that SGLang's salt reaches the page hashes.
"""

import hashlib
import secrets
from collections.abc import Callable

import pytest

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.conformance import LENGTHS, soon, spill
from memkv_sglang.testing.pages import make_hashes, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, Lookup
from memkv_sglang.tiers.minio import MinioTier

OpenTier = Callable[[MinioConfig], MinioTier]
PAGES = 40
NAMESPACE = make_namespace()


def chain_of(text: str, salt: str) -> Chain:
    """Return the chain of a text for a tenant with this salt."""
    hashes = make_hashes(PAGES, text, parent=hashlib.sha256(salt.encode()).digest())
    return Chain(NAMESPACE.digest, hashes)


class Cost:
    """The cost of a lookup that a tenant could measure: round trips and requests."""

    def __init__(self, tier: MinioTier, monkeypatch: pytest.MonkeyPatch) -> None:
        self._tier = tier
        self._asked: list[int] = []
        ask = tier._ask

        def counting(keys: object, deadline: float) -> list[bool]:
            self._asked.append(len(keys))  # type: ignore[arg-type]  # it is a sequence
            return ask(keys, deadline)  # type: ignore[arg-type]  # passed on as it came

        monkeypatch.setattr(tier, "_ask", counting)
        # The number of HEADs per round depends on the round-trip time, which each connection
        # measures anew.
        monkeypatch.setattr("memkv_sglang.tiers.minio.tier.best_width", lambda *_: 8)

    def of(self, chain: Chain) -> tuple[Lookup, list[int], int]:
        self._asked.clear()
        before = self._tier.telemetry.counts().get("lookup_round_trips", 0)
        found = self._tier.lookup(chain, soon())
        trips = self._tier.telemetry.counts().get("lookup_round_trips", 0) - before
        return found, self._asked.copy(), trips


@pytest.mark.parametrize("node", ["the tenant's own", "another"])
@pytest.mark.parametrize("stored", [1, 17, PAGES])
def test_lookup_of_anothers_text_costs_the_same_as_a_random_one(
    minio_config: MinioConfig,
    open_tier: OpenTier,
    monkeypatch: pytest.MonkeyPatch,
    node: str,
    stored: int,
) -> None:
    victim = open_tier(minio_config)
    spill(victim, chain_of("a secret document", "the tenant").keys()[:stored])
    asking = victim if node == "the tenant's own" else open_tier(minio_config)
    asking.check(soon())
    cost = Cost(asking, monkeypatch)
    found, asked, trips = cost.of(chain_of("a secret document", "a spy"))
    assert found == (0, True)
    assert (found, asked, trips) == cost.of(chain_of(secrets.token_hex(), "a spy"))
    assert asking.lookup(chain_of("a secret document", "the tenant"), soon()).length == stored


def test_another_tenants_pages_are_not_loaded(
    minio_config: MinioConfig, open_tier: OpenTier
) -> None:
    tier = open_tier(minio_config)
    spill(tier, chain_of("a secret document", "the tenant").keys())
    for key in chain_of("a secret document", "a spy").keys():
        page = make_page(key, LENGTHS, filled=False)
        assert tier.load([page], soon()) == [LoadResult.MISSING]


def test_prefixes_keep_tenants_apart_without_a_salt(
    minio_config: MinioConfig, open_tier: OpenTier
) -> None:
    """Each tenant has its own agent and prefix in one bucket, optionally with its own policy."""
    import msgspec

    chain = chain_of("a document", "")
    one, two = (
        open_tier(msgspec.structs.replace(minio_config, prefix=prefix)) for prefix in ("one", "two")
    )
    spill(one, chain.keys())
    assert two.lookup(chain, soon()) == (0, True)
    spill(two, chain.keys())
    assert two.clear(NAMESPACE.digest) == PAGES
    fresh = open_tier(msgspec.structs.replace(minio_config, prefix="one"))
    assert fresh.lookup(chain, soon()) == (PAGES, True)
