"""Do not pin memory: PyTorch refuses to without a GPU."""

from typing import Any

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def not_pinned(*args: Any, **kwargs: Any) -> Arguments:
    """Run before calls with `pin_memory`, which HiCache's pools and LoRA always set."""
    return args, {**kwargs, "pin_memory": False}


def unchanged(tensor: Any, *_args: Any, **_kwargs: Any) -> Any:
    """Replace `torch.Tensor.pin_memory`."""
    return tensor
