"""Compiles the extensions if there is a C compiler with Python's headers.

Without them, pages are read from MinIO one by one; see
`memkv_sglang.tiers.minio.objects.bulk_reader`.
"""

import shutil
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "memkv_sglang.tiers.minio.http"
MODULES = ("receive_loop", "xxh3")


class CompileLoop(BuildHookInterface):
    """Builds the extensions next to their sources, and adds them to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Remove old extensions and compile new ones; a failure is only a warning."""
        folder = Path(self.root, *PACKAGE.split("."))
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        targets = [folder / f"{module}{suffix}" for module in MODULES]
        try:
            for target in targets:
                target.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory() as scratch:
                for built, target in zip(_compile(folder, scratch), targets, strict=True):
                    shutil.copy(built, target)
        except Exception as error:
            self.app.display_warning(f"{folder} was not compiled: {error}")
            return
        build_data["artifacts"] += [str(target.relative_to(self.root)) for target in targets]
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def _compile(folder: Path, scratch: str) -> Sequence[Path]:
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    extensions = [Extension(f"{PACKAGE}.{name}", [str(folder / f"{name}.pyx")]) for name in MODULES]
    modules = cythonize(extensions, build_dir=scratch, language_level=3, quiet=True)
    command = Distribution({"ext_modules": modules}).get_command_obj("build_ext")
    command.build_lib = command.build_temp = scratch
    command.ensure_finalized()
    command.run()
    return [Path(command.get_ext_fullpath(extension.name)) for extension in extensions]
