"""Compiles what is compiled of this project, where there is a C compiler with Python's headers.

Elsewhere the project is installed without: pages are then read from MinIO one by one, see
`memkv_sglang.tiers.minio.bulk`.
"""

import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODULE = "memkv_sglang.tiers.minio.bulk.loop"


class CompileLoop(BuildHookInterface):
    """Builds the extension beside its source, and says so to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a failure is told, and no more. What an older source gave goes in any case."""
        source = Path(self.root, *MODULE.split(".")).with_suffix(".pyx")
        built = source.with_suffix(sysconfig.get_config_var("EXT_SUFFIX"))
        try:
            built.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                shutil.copy(_compile(source, folder), built)
        except Exception as error:
            self.app.display_warning(f"{source} was not compiled: {error}")
            return
        build_data["artifacts"].append(str(built.relative_to(self.root)))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def _compile(source: Path, folder: str) -> Path:
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    extension = Extension(MODULE, [str(source)])
    modules = cythonize(extension, build_dir=folder, language_level=3, quiet=True)
    command = Distribution({"ext_modules": modules}).get_command_obj("build_ext")
    command.build_lib = command.build_temp = folder
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(MODULE))
