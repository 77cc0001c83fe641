from pathlib import Path

from memkv_sglang.plugin.document import document

PAGE = Path(__file__).parents[2] / "docs" / "flags.md"


def test_the_page_is_generated_from_the_code() -> None:
    assert PAGE.read_text() == document(), (
        "run: python -m memkv_sglang.plugin.document > docs/flags.md"
    )
