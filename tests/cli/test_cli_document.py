from pathlib import Path

from memkv_sglang.cli.document import document

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_matches_the_help_texts() -> None:
    assert PAGE.read_text() == document(), "run: python -m memkv_sglang.cli.document > docs/cli.md"
