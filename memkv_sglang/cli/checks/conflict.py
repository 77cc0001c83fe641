"""Check that no other distribution has installed a package of the same name."""

from collections.abc import Iterator
from importlib.metadata import packages_distributions

from memkv_sglang.finding import Finding

DISTRIBUTION, PACKAGE = "sglang-memkv", "memkv_sglang"


def check_conflict() -> Iterator[Finding]:
    """Look for other distributions that install our package, in their metadata only."""
    owners = {name.lower().replace("_", "-") for name in packages_distributions().get(PACKAGE, [])}
    others = sorted(owners - {DISTRIBUTION})
    if others:
        yield Finding(
            "FAIL",
            "installation",
            f"{', '.join(others)} also installs the package {PACKAGE}, so files of both are mixed",
            f"pip uninstall {' '.join(others)}, then pip install --force-reinstall {DISTRIBUTION}",
        )
