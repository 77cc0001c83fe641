"""Keep SGLang from pinning memory, which PyTorch refuses without a GPU."""

from typing import Any

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def not_pinned(*args: Any, **kwargs: Any) -> Arguments:
    """Run before calls with `pin_memory`, which HiCache and LoRA always set, and clear it."""
    return args, {**kwargs, "pin_memory": False}


def unchanged(tensor: Any, *_args: Any, **_kwargs: Any) -> Any:
    """Replace `torch.Tensor.pin_memory`; return the tensor as it is."""
    return tensor
