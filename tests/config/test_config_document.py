from pathlib import Path

from memkv_sglang.config.document import document
from memkv_sglang.config.settings import all_settings

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_matches_the_schema() -> None:
    assert PAGE.read_text() == document(), (
        "run: python -m memkv_sglang.config.document > docs/configuration.md"
    )


def test_every_setting_has_a_description() -> None:
    assert [setting.key for setting in all_settings() if not setting.description] == []
