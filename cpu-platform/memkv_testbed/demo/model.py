"""The demo's model: the tiny Llama with more query heads, created once in the user's cache.

With more query heads, the same bytes of KV take more time to compute, as in large models. One layer
less than the tiny Llama has saves a quarter of the demo's time, most of which is prefill.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from memkv_testbed.demo.needs import DemoError
from memkv_testbed.server_binaries import cache_directory

SEED = 0
QUERY_HEADS = 8
LAYERS = 3
DESCRIPTION = f"random-weight Llama, {LAYERS} layers, {QUERY_HEADS} query and 2 KV heads, float32"


def cached_model() -> Path:
    """Return the model's directory. Creates the model if necessary. Raises `DemoError`."""
    version = importlib.metadata.version("transformers")
    models = cache_directory().parent / "models"
    directory = models / f"llama-heads{QUERY_HEADS}-layers{LAYERS}-seed{SEED}-transformers{version}"
    if not directory.exists():
        models.mkdir(parents=True, exist_ok=True)
        # Rename the complete model into place, so that an interrupted demo does not leave half of
        # one.
        with tempfile.TemporaryDirectory(prefix=".model-", dir=models) as temporary:
            made = Path(temporary) / "model"
            _make_in_another_process(made)
            if not directory.exists():
                made.rename(directory)
    return directory


def _make_in_another_process(directory: Path) -> None:
    """Run `make` in another process, to keep PyTorch and its memory out of this one."""
    command = [sys.executable, "-m", "memkv_testbed.demo.model", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DemoError(f"could not create the model: {why}")


def make(directory: Path) -> None:
    """Write the model and its tokenizer to `directory`."""
    import torch
    from sglang_cpu_platform import tiny_model
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny_model.make(directory, "mha", SEED)
    path = directory / "config.json"
    more = {"num_attention_heads": QUERY_HEADS, "num_hidden_layers": LAYERS}
    values = json.loads(path.read_text()) | more
    path.write_text(json.dumps(values, indent=2))
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    model.float().save_pretrained(directory)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
