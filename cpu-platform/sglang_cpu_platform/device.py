"""Return the right PyTorch device module when SGLang names no device."""

from collections.abc import Callable
from typing import Any


def module(original: Callable[..., Any], device: Any = None) -> Any:
    """Wrap `torch.get_device_module`, whose default is CUDA even without a GPU."""
    return original("cpu" if device is None else device)
