"""Let SGLang ask PyTorch for the module of its device, without naming one."""

from collections.abc import Callable
from typing import Any


def module(original: Callable[..., Any], device: Any = None) -> Any:
    """Wrap `torch.get_device_module`: by default, PyTorch names CUDA even without a GPU."""
    return original("cpu" if device is None else device)
