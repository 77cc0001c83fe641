"""The demo's table at common widths, its picture and its JSON file."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from memkv_testbed.demo.figures import compute_figures, samples
from memkv_testbed.demo.picture import draw
from memkv_testbed.demo.report import write_json
from memkv_testbed.demo.table import make_table
from rich.console import Console

from tests.demo.demo_run import CHANGED_AT, PAGE, make_run

PNG = b"\x89PNG\r\n\x1a\n"


def text_of_table(width: int, **change: object) -> str:
    run = [dataclasses.replace(request, **change) for request in make_run()]  # type: ignore[arg-type]  # any field
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(make_table(run, width))
    return capture.get()


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_the_terminal_without_truncation(width: int) -> None:
    text = text_of_table(width)
    assert "…" not in text
    for figure in ("16,411", "16,384", "12,288", "13.00", "70x", "again x3", "A*"):
        assert figure in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_different_answer_is_marked() -> None:
    assert "✗" not in text_of_table(80)
    assert "✗" in text_of_table(80, output_ids=[1])


def test_unknown_values_are_shown_as_unknown() -> None:
    assert "…" in text_of_table(80, reference=None)


def test_picture_is_a_png_even_if_a_source_was_not_measured(tmp_path: Path) -> None:
    times = samples(make_run(), PAGE)
    for number, host in enumerate((times["host"], [])):
        path = tmp_path / f"{number}.png"
        draw(times | {"host": host}, "how it was measured", path)
        assert path.read_bytes().startswith(PNG)


def test_json_file_has_flat_figures_and_every_request(tmp_path: Path) -> None:
    run = make_run()
    path = tmp_path / "out.json"
    write_json(path, compute_figures(run, PAGE, CHANGED_AT), run, {"page_size": PAGE}, 200.0)
    document = json.loads(path.read_text())
    assert not any(isinstance(value, dict | list) for value in document["figures"].values())
    assert [request["step"] for request in document["requests"]] == [each.step for each in run]
    assert document["requests"][1]["reused"] == {
        "device": 0,
        "host": 0,
        "nvme": 0,
        "minio": 16384,
    }
