"""An SGLang that tests may change, with only the files that a series changes."""

import shutil
from importlib.metadata import distribution
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang")

from memkv_sglang.patching.series import Series, read_series, series_folder, versions
from tools.sglang_diff.wheels import fetch

INSTALLED = distribution("sglang").version
OTHERS = [version for version in versions(series_folder()) if version != INSTALLED]


@pytest.fixture(
    scope="session",
    params=[INSTALLED, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)],
)
def series(request: pytest.FixtureRequest) -> Series:
    return read_series(series_folder(), request.param)


@pytest.fixture
def site_packages(tmp_path: Path, series: Series) -> Path:
    """Copies of the real files, few enough to be copied in milliseconds."""
    if series.version == INSTALLED:
        source = Path(str(distribution("sglang").locate_file("")))
    else:
        source = fetch(series.version)
    root = tmp_path / "site-packages"
    for path, sums in series.manifest.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if sums.before is not None:
            shutil.copy2(source / path, root / path)
    metadata = f"sglang-{series.version}.dist-info"
    (root / metadata).mkdir()
    shutil.copy2(source / metadata / "METADATA", root / metadata)
    return root
