"""Page hashes computed without a compiler equal those of SGLang's extension."""

import logging
import time
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

from sglang.srt.mem_cache.cpp_utils import native_hash
from sglang_cpu_platform import page_hash
from sglang_cpu_platform.page_hash import HashlibPageHash, PageHash

from memkv_sglang.page_hash import PythonPageHash
from tests.sglang_versions import IS_NEWEST

HASHLIB = HashlibPageHash()


@pytest.fixture(scope="module")
def extension() -> PageHash:
    load = native_hash._load_native_hash_module
    load = getattr(load, "__wrapped__", load) if load.__module__ != native_hash.__name__ else load
    try:
        module: PageHash = load()
    except RuntimeError as error:
        pytest.skip(f"needs g++, ninja and the headers of OpenSSL: {error.__cause__}")
    return module


narrow = st.integers(0, 2**32 - 1)
# The extension of SGLang 0.5.22 refuses larger ones, which only its successors put in prompts.
wide = st.integers(0, 2**63 - 1) if IS_NEWEST else narrow
digests = st.none() | st.binary(min_size=32, max_size=32)
page_sizes = st.none() | st.integers(1, 9)


@given(
    raw=st.lists(narrow, max_size=40).map(lambda ids: array("I", ids))
    | st.lists(narrow | wide, max_size=40).map(lambda ids: array("q", ids)),
    unit_width=st.integers(1, 3),
    is_bigram=st.booleans(),
    prior=digests,
    page_size=page_sizes,
)
def test_equals_the_extension(
    extension: PageHash,
    raw: "array[int]",
    unit_width: int,
    is_bigram: bool,
    prior: bytes | None,
    page_size: int | None,
) -> None:
    units = max(len(raw) - 1, 0) if is_bigram else len(raw) // unit_width
    arguments = (raw, units, 2 if is_bigram else unit_width, is_bigram, prior, page_size)
    assert HASHLIB.get_hash(*arguments) == extension.get_hash(*arguments)
    assert PythonPageHash().get_hash(*arguments) == extension.get_hash(*arguments)


@pytest.mark.parametrize(
    ("raw", "units", "prior", "page_size"),
    [
        (array("q", [1, 2]), 3, None, None),
        (array("q", [1, 2]), 2, b"short", None),
        (array("q", [1, 2]), 2, None, 0),
        (array("q", [1, -2]), 2, None, 2),
        (array("H", [1, 2]), 2, None, 2),
    ],
)
def test_refuses_what_the_extension_refuses(
    extension: PageHash,
    raw: "array[int]",
    units: int,
    prior: bytes | None,
    page_size: int | None,
) -> None:
    with pytest.raises((ValueError, IndexError)) as theirs:
        extension.get_hash(raw, units, 1, False, prior, page_size)
    with pytest.raises(theirs.type):
        HASHLIB.get_hash(raw, units, 1, False, prior, page_size)


def test_a_long_prompt_is_hashed_in_milliseconds() -> None:
    prompt = array("q", range(24_000))
    begin = time.process_time()
    hashes = HASHLIB.get_hash(prompt, len(prompt), 1, False, None, 64)
    assert len(hashes) == 375
    assert time.process_time() - begin < 0.5


def test_replaces_the_extension_only_if_it_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(page_hash, "_fallback", None)
    built = HashlibPageHash()
    assert page_hash.load(lambda: built) is built

    def fail() -> PageHash:
        raise RuntimeError("Failed to load") from OSError("no ninja")

    with caplog.at_level(logging.WARNING):
        first, second = page_hash.load(fail), page_hash.load(fail)
    assert isinstance(first, HashlibPageHash)
    assert first is second
    assert [record.getMessage() for record in caplog.records] == [
        "page hashes use hashlib, which is slower: the extension cannot be built: no ninja"
    ]
