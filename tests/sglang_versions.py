"""Marks for tests of what only some of the supported versions of SGLang have."""

import pytest

from memkv_sglang.plugin.versions import NEWEST, SUPPORTED, installed

IS_NEWEST = installed() not in SUPPORTED[:-1]
"""Whether the installed SGLang is the newest supported version, or one not assessed yet."""

since_0_5_23 = pytest.mark.skipif(
    not IS_NEWEST, reason=f"needs SGLang {NEWEST}: DCP in storage, identities of media, key scheme"
)
