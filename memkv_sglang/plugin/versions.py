"""The versions of SGLang that this project supports."""

SUPPORTED = ("0.5.23",)
"""Oldest first."""

NEWEST = SUPPORTED[-1]
