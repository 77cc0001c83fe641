"""docs/testing.md names tests of `make test` for every promise of the README."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`([\w/]+\.py)(?:::(\w+))?`")


def table() -> str:
    text = (ROOT / "docs" / "testing.md").read_text()
    return text.partition("## Which test covers which promise")[2].partition("\n## ")[0]


LEFT_OUT = {"pytest.mark.slow", "pytest.mark.soak"}
"""Markers of tests that `make test` does not run."""


def is_slow(decorated: ast.FunctionDef) -> bool:
    return not LEFT_OUT.isdisjoint(map(ast.unparse, decorated.decorator_list))


def test_every_promise_of_the_readme_is_in_the_table() -> None:
    promises = (ROOT / "README.md").read_text().partition("## What it promises")[2]
    titles = re.findall(r"^- \*\*(.*)\.\*\*", promises.partition("\n## ")[0], re.MULTILINE)
    assert titles
    assert [title for title in titles if f"| {title} |" not in table()] == []


def test_the_tests_of_the_table_exist_and_are_not_slow() -> None:
    rows = [line for line in table().splitlines() if line.startswith("| ")][1:]
    assert all(NAMED.search(row) for row in rows)
    for file, name in NAMED.findall("\n".join(rows)):
        module = ast.parse((ROOT / "tests" / file).read_text())
        functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
        assert not name or not is_slow(functions[name]), f"{file}::{name}"
        assert not any(
            isinstance(node, ast.Assign)
            and "pytestmark" in ast.unparse(node.targets[0])
            and "mark.slow" in ast.unparse(node.value)
            for node in module.body
        ), file
