"""Memory pinned for a GPU: there is none, and PyTorch refuses to pin without one."""

from typing import Any

# The functions of `torch` that SGLang's LoRA has make pinned tensors.
FACTORIES = ("tensor", "zeros")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def not_pinned(*args: Any, **kwargs: Any) -> Arguments:
    """Run before a call that takes `pin_memory`: HiCache's pools and LoRA ask for it always."""
    return args, {**kwargs, "pin_memory": False}


def as_it_is(tensor: Any, *_args: Any, **_kwargs: Any) -> Any:
    """Replace `torch.Tensor.pin_memory`."""
    return tensor
