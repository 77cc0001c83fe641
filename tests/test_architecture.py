"""The walkthrough in docs/architecture.md names functions that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEP = re.compile(r"^\| \d+\. .*\| `(memkv_sglang/[\w/]+\.py)` `([\w.]+)` \|", re.MULTILINE)


def functions(path: Path) -> set[str]:
    """Return the qualified names of a module's functions and methods."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{method.name}"
                for method in node.body
                if isinstance(method, ast.FunctionDef)
            }
    return names


def test_life_of_a_page_names_existing_functions() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.partition("## Life of a page")[2].partition("\n## ")[0]
    steps = STEP.findall(section)
    assert len(steps) == 20  # ten steps for a spill, ten for a load
    missing = [f"{file} {name}" for file, name in steps if name not in functions(ROOT / file)]
    assert missing == []
