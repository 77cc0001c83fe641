import difflib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv_sglang.patching.unified_diff import MismatchError, apply, parse, revert

# Few distinct lines, so that they repeat; some look like parts of a diff.
LINES = st.lists(
    st.sampled_from(["a\n", "b\n", "\n", "-- x\n", "++ b/x\n", "\x0c\n", "@@ -1 +1 @@\n"])
)


@given(LINES, LINES)
def test_a_diff_leads_from_old_to_new_and_back(old: list[str], new: list[str]) -> None:
    text = "".join(difflib.unified_diff(old, new, "a/file.py", "b/file.py"))
    hunks = [hunk for file in parse(text.encode()) for hunk in file.hunks]
    before, after = "".join(old).encode(), "".join(new).encode()
    assert apply(before, hunks) == after
    assert revert(after, hunks) == before


def test_another_file_is_refused() -> None:
    (file,) = parse(b"A title\n\n--- a/x.py\n+++ b/x.py\n@@ -2,2 +2,2 @@\n one\n-two\n+three\n")
    assert file.path == "x.py"
    assert apply(b"zero\none\ntwo\n", file.hunks) == b"zero\none\nthree\n"
    for other in (b"one\ntwo\n", b"zero\none\n", b"zero\none\n two\n", b""):
        with pytest.raises(MismatchError):
            apply(other, file.hunks)
