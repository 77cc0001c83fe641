"""Compile the Cython modules when the project is built, if there is a C compiler.

Without one, the build succeeds with Python code only, and loads from MinIO take the slow path; see
`memkv_sglang.tiers.minio.objects.bulk_client`.
"""

import shutil
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "memkv_sglang.tiers.minio.http"
MODULES = (
    "bulk_batch",
    "bulk_heads",
    "bulk_loop",
    "bulk_requests",
    "bulk_sealing",
    "bulk_stream",
    "libcrypto",
    "xxh3",
)


class CompileModules(BuildHookInterface):
    """Compile the extension modules next to their sources and add them to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Replace earlier builds of the modules; warn if they do not compile."""
        folder = Path(self.root, *PACKAGE.split("."))
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        targets = [folder / f"{module}{suffix}" for module in MODULES]
        try:
            # A module built from older sources must not survive a failed build.
            for target in targets:
                target.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory() as scratch:
                for built, target in zip(_compile(folder, scratch), targets, strict=True):
                    shutil.copy(built, target)
        except Exception as error:
            self.app.display_warning(f"building without compiled modules: {error}")
            return
        build_data["artifacts"] += [str(target.relative_to(self.root)) for target in targets]
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def _compile(folder: Path, scratch: str) -> Sequence[Path]:
    """Compile the modules into `scratch`; return the paths of the shared objects."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    extensions = [Extension(f"{PACKAGE}.{name}", [str(folder / f"{name}.pyx")]) for name in MODULES]
    modules = cythonize(extensions, build_dir=scratch, language_level=3, quiet=True)
    command = Distribution({"ext_modules": modules}).get_command_obj("build_ext")
    command.build_lib = command.build_temp = scratch
    command.ensure_finalized()
    command.run()
    return [Path(command.get_ext_fullpath(extension.name)) for extension in extensions]
