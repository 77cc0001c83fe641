import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv_sglang.config.units import format_size, format_time, parse_size, parse_time


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("100GiB", 100 << 30),
        ("512MB", 512_000_000),
        ("1.5 KiB", 1536),
        ("0.3KiB", 307),
        ("7", 7),
        (" 7B ", 7),
        ("2PiB", 2 << 50),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("2s", 2.0), ("1h", 3600.0), ("1.5m", 90.0), ("2d", 172800.0), ("0.1", 0.1)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "1 GiB 2", "100G", "1gib", "1e3", "1,5GiB", "2s", "0x10", "\u0661"]
)
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "s", "-1s", "2 hours", "1us", "1MiB", "nan", "inf", "1h30m"])
def test_invalid_times(text: str) -> None:
    with pytest.raises(ValueError):
        parse_time(text)


@given(st.integers(0, 1 << 60))
def test_formatted_sizes_parse_back(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.floats(0, 1e6).map(lambda seconds: round(seconds, 3)))
def test_formatted_times_parse_back(seconds: float) -> None:
    assert parse_time(format_time(seconds)) == pytest.approx(seconds, rel=1e-5)


def test_times_and_sizes_use_the_largest_whole_unit() -> None:
    shown = [format_time(seconds) for seconds in (0.0, 0.1, 0.25, 2.0, 90.0, 3600.0)]
    assert shown == ["0s", "100ms", "250ms", "2s", "90s", "1h"]
    assert [format_size(size) for size in (0, 1536, 100 << 30)] == ["0B", "1536B", "100GiB"]
