"""Page hashes equal those that SGLang computes."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_cpu_platform.page_hash import HashlibPageHash

from memkv_sglang.page_hash import chain_seed, page_hashes

tokens_of = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 2**40), max_size=40)


@given(tokens_of, st.integers(1, 8), st.binary(min_size=32, max_size=32) | st.just(b""))
def test_hashes_equal_those_of_sglang(tokens: list[int], size: int, seed: bytes) -> None:
    whole = len(tokens) // size * size
    expected = HashlibPageHash().get_hash(
        array("q", tokens),
        whole,
        1,
        is_bigram=False,
        prior_digest=seed or None,
        page_size=size,
    )
    assert [page.hex() for page in page_hashes(tokens, size, seed)] == expected


@pytest.mark.parametrize("extra_key", [None, "", "lora"])
@pytest.mark.parametrize("salt", [None, "", "tenant"])
def test_seed_equals_that_of_sglang(extra_key: str | None, salt: str | None) -> None:
    from sglang.srt.mem_cache.utils import storage_namespace_seed

    expected = storage_namespace_seed(extra_key, salt)
    assert chain_seed(extra_key, salt) == (bytes.fromhex(expected) if expected else b"")


def test_invalid_token_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="token"):
        page_hashes([-1], 1)
