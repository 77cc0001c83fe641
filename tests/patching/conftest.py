"""An installed SGLang that tests may change, with only the files that a series changes."""

import shutil
from importlib.metadata import distribution
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

from memkv_sglang.patching.series import Series, read_series, series_folder


@pytest.fixture(scope="session")
def series() -> Series:
    return read_series(series_folder(), distribution("sglang").version)


@pytest.fixture
def site_packages(tmp_path: Path, series: Series) -> Path:
    """Copies of the real files, few enough to be copied in milliseconds."""
    installed = distribution("sglang")
    root = tmp_path / "site-packages"
    for path, sums in series.manifest.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if sums.before is not None:
            shutil.copy2(str(installed.locate_file(path)), root / path)
    metadata = f"sglang-{installed.version}.dist-info"
    (root / metadata).mkdir()
    shutil.copy2(str(installed.locate_file(f"{metadata}/METADATA")), root / metadata)
    return root
