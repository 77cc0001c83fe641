"""Parse and format sizes and times with units: `100GiB`, `512MB`, `250ms`, `2s`, `1h`."""

import re
from collections.abc import Mapping
from fractions import Fraction

_POWERS = "KMGTP"

SIZE_UNITS: Mapping[str, int] = {
    "B": 1,
    **{f"{letter}iB": 1024**power for power, letter in enumerate(_POWERS, 1)},
    **{f"{letter}B": 1000**power for power, letter in enumerate(_POWERS, 1)},
}
"""Bytes per unit. Units like `KiB` are binary; units like `KB` are decimal."""

TIME_UNITS: Mapping[str, Fraction] = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}
"""Seconds per unit."""

MAX_SIZE = 4096 * 1024**5
"""Maximum of settings with a size, in bytes: half of the largest file offset."""

MAX_TIME = 36500 * 86400.0
"""Maximum of settings with a time, in seconds: a hundred years. Timers overflow after a few
hundred."""

_QUANTITY = re.compile(r"(\d{1,40}(?:\.\d{1,40})?) ?([A-Za-z]{0,3})", re.ASCII)


def parse_size(text: str) -> int:
    """Return bytes, rounded down; a number without a unit is bytes. Raises `ValueError`."""
    return int(_parse(text, SIZE_UNITS, "B"))


def parse_time(text: str) -> float:
    """Return seconds; a number without a unit is seconds. Raises `ValueError`."""
    return float(_parse(text, TIME_UNITS, "s"))


def format_size(size: int) -> str:
    """Format bytes in the largest unit that gives a whole number, so that it parses back."""
    return _format(Fraction(size), SIZE_UNITS, "B")


def format_time(seconds: float) -> str:
    """Format seconds in the largest unit that gives a whole number, so that it parses back."""
    return _format(Fraction(repr(seconds)), TIME_UNITS, "s")


def _parse(text: str, units: Mapping[str, int | Fraction], default: str) -> Fraction:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, unit = match.groups()
    if (unit or default) not in units:
        raise ValueError(text)
    return Fraction(number) * units[unit or default]


def _format(value: Fraction, units: Mapping[str, int | Fraction], default: str) -> str:
    if not value:
        return f"0{default}"
    fitting = [unit for unit in units if (value / units[unit]).denominator == 1]
    if not fitting:
        return f"{float(value):g}{default}"
    unit = max(fitting, key=lambda name: units[name])
    return f"{value / units[unit]}{unit}"
