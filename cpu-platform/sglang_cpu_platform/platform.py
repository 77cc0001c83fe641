"""The platform object that tells SGLang what this machine supports."""

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """The CPU as an out-of-tree platform.

    SGLang's own CPU engine (`SGLANG_USE_CPU_ENGINE=1`) needs a special build of its
    kernels. An out-of-tree platform uses the PyTorch path of every fused operation, so the
    wheel from PyPI is enough.
    """

    _enum = PlatformEnum.OOT
    # No Triton, no graphs, no transfer kernels.
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int = 0) -> str:
        """Return the device's name, a string because SGLang compares it with `"cpu"`."""
        return "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Default to the only attention backend that needs no kernel library."""
        if server_args.attention_backend is None:
            server_args.attention_backend = "torch_native"

    def get_default_attention_backend(self) -> str:
        """Return the attention backend for models that do not choose one."""
        return "torch_native"

    def is_pin_memory_available(self, device: object = None) -> bool:
        """Return False, because there is no device to pin memory for."""
        return False

    def get_compile_backend(self, mode: str | None = None) -> str:
        """Return the backend that compiles nothing."""
        return "eager"
