"""Import SGLang's host pools without the packages that only its servers need.

SGLang's modules import kernels, model libraries and web servers. The host pools use none of them to
allocate, register and address memory. So these packages are replaced by ones whose attributes are
empty classes. Nothing that the trial reports comes from such a class.
"""

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType

PARTS = (
    "arg_groups",
    "environ.py",
    "mem_cache",
    "observability",
    "platforms",
    "plugins",
    "runtime_context.py",
    "utils",
)
"""Parts of `sglang.srt` that the host pools need."""

STUBBED = (
    *("sglang.kernels", "sglang.srt.mem_cache.memory_pool"),
    *(f"sglang.srt.{name}" for name in ("configs", "distributed", "layers", "models")),
    *("PIL", "aiohttp", "dill", "orjson", "pybase64", "pynvml", "requests", "sgl_kernel"),
    *("starlette", "torchcodec", "tqdm", "transformers", "zmq"),
)
"""What SGLang's modules import, but the host pools do not use."""


def import_host_pools(folder: Path) -> None:
    """Make `sglang.srt.mem_cache.pool_host` importable from the package in `folder`.

    Affects the whole process: the stubs hide packages that are installed.
    """
    sys.meta_path.insert(0, _Stubs())
    sglang = ModuleType("sglang")  # its own __init__ imports the servers
    sglang.__path__ = [str(folder / "sglang")]
    sys.modules["sglang"] = sglang


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds any module of the stubbed packages, and makes an empty one."""

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not f"{name}.".startswith(tuple(f"{one}." for one in STUBBED)):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _StubModule(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Stub,), {})


class _Attributes(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Stub,), {})


class _Stub(metaclass=_Attributes):
    """Stands for a base class, a decorator, or a check that answers no."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *arguments: object, **_: object) -> object:
        return arguments[0] if arguments else self

    def __bool__(self) -> bool:
        return False
