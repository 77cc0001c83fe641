"""Send weights from memory within an update session, like a trainer does."""

import base64
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from sglang.srt.utils import init_custom_process_group
from sglang_cpu_platform.server import HOST, free_port
from torch import distributed

from tests.serving.node import Node

GROUP = "training"


def tensors_of(model: Path) -> dict[str, Any]:
    tensors: dict[str, Any] = load_file(model / "model.safetensors")
    return tensors


def send_as_tensors(node: Node, model: Path) -> None:
    """Send all weights in the request itself."""
    content = base64.b64encode(pickle.dumps(list(tensors_of(model).items()))).decode()
    node.client.post("/update_weights_from_tensor", {"serialized_named_tensors": [content]})


def broadcast(node: Node, model: Path) -> None:
    """Send all weights through a process group of this process and the server's rank."""
    tensors, port = tensors_of(model), free_port()
    where = {"master_address": HOST, "master_port": port, "group_name": GROUP}
    ranks = {"rank_offset": 1, "world_size": 2, "backend": "gloo"}
    names = {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "group_name": GROUP,
    }
    with ThreadPoolExecutor(1) as server:
        joined = server.submit(node.client.post, "/init_weights_update_group", {**where, **ranks})
        group = init_custom_process_group(
            "gloo", f"tcp://{HOST}:{port}", world_size=2, rank=0, group_name=GROUP
        )
        joined.result()
        received = server.submit(node.client.post, "/update_weights_from_distributed", names)
        for tensor in tensors.values():
            distributed.broadcast(tensor, src=0, group=group)
        received.result()
        node.client.post("/destroy_weights_update_group", {"group_name": GROUP})
    distributed.destroy_process_group(group)
