"""Create tiny models with random weights, without a download.

`mha` is a Llama with grouped-query attention, `mla` a DeepSeek-V2 with latent attention and
no experts, `swa` a Mellum without experts, in which every other layer sees a window of
`WINDOW` tokens, and `vision` a Qwen2-VL, which takes images. All have 4 layers, a context of
32,768 tokens, a byte-level tokenizer (one token per byte) and 4 KiB of KV per token in float32, so
a page of 64 tokens has 256 KiB (128 KiB in each of the two pools of `swa`). The weights depend only
on kind, seed and library versions.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal

Kind = Literal["mha", "mla", "swa", "vision"]

CONTEXT_LENGTH = 32768

WINDOW = 256
"""Number of tokens that a sliding layer of the `swa` model sees, including the token itself."""

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
"""Stands for an image in a prompt of the `vision` model."""

_SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
_VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    # Large enough that greedy choices are clear and depend on the whole prompt.
    "initializer_range": 0.2,
}
_LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
# All layers are dense, but the configuration requires routed experts.
_DEEPSEEK = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 192,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "first_k_dense_replace": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
}


_VISION: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 64,
    "num_heads": 2,
    "hidden_size": _COMMON["hidden_size"],
    "mlp_ratio": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "in_chans": 3,  # SGLang's name of `in_channels`
    "initializer_range": _COMMON["initializer_range"],
}
_PIXELS = {"min_pixels": 28 * 28, "max_pixels": 64 * 28 * 28}
"""Each token stands for 28 x 28 pixels."""


def make(directory: Path, kind: Kind = "mha", seed: int = 0) -> None:
    """Write a model and its tokenizer to `directory`, in the format of Hugging Face.

    Args:
        directory: where to write. It is created if necessary. Files of the same names are replaced.
        kind: `mha`, `mla`, `swa` or `vision`.
        seed: seed of the random weights.

    """
    import torch

    torch.manual_seed(seed)
    makers = {"mha": _llama, "mla": _deepseek, "swa": _mellum, "vision": _qwen_vl}
    makers[kind]().float().save_pretrained(directory)
    (_processor() if kind == "vision" else _tokenizer()).save_pretrained(directory)


def make_lora(directory: Path, seed: int = 0, rank: int = 8) -> None:
    """Write a LoRA adapter for the `mha` model to `directory`, in the format of PEFT."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = _LLAMA["num_attention_heads"], _LLAMA["num_key_value_heads"]
    # SGLang 0.5.23 loads the adapters of query, key and value together, or not at all.
    outputs = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads, "o_proj": heads}
    tensors = {}
    for layer in range(_COMMON["num_hidden_layers"]):
        for target, output in outputs.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            down = torch.randn((rank, _COMMON["hidden_size"]), generator=generator)
            up = torch.randn((output * _LLAMA["head_dim"], rank), generator=generator)
            tensors[f"{name}.lora_A.weight"] = 0.1 * down
            tensors[f"{name}.lora_B.weight"] = 0.1 * up
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(outputs),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_COMMON, **_LLAMA, vocab_size=len(_tokens())))


def _deepseek() -> Any:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(**_COMMON, **_DEEPSEEK, vocab_size=len(_tokens()))
    return DeepseekV2ForCausalLM(config)


def _mellum() -> Any:
    from transformers import MellumConfig, MellumForCausalLM

    layers = _COMMON["num_hidden_layers"]
    config = MellumConfig(
        **_COMMON,
        **_LLAMA,
        vocab_size=len(_tokens()),
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        # All layers are dense, but the configuration describes routed experts too.
        mlp_layer_types=["dense"] * layers,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=64,
    )
    return MellumForCausalLM(config)


def _qwen_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    start, end, image, video = range(len(_tokens()), len(_tokens()) + len(_VISION_TOKENS))
    # Parts of a head for time, height and width. SGLang reads the type from two fields.
    rope = {
        "rope_type": "default",
        "type": "mrope",
        "rope_theta": 1e4,
        "mrope_section": [8, 12, 12],
    }
    config = Qwen2VLConfig(
        text_config={
            **_COMMON,
            "num_attention_heads": _LLAMA["num_attention_heads"],
            "num_key_value_heads": _LLAMA["num_key_value_heads"],
            "vocab_size": video + 1,
            "rope_parameters": rope,
        },
        vision_config=_VISION,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    return Qwen2VLForConditionalGeneration(config)


def _processor() -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = _tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": _VISION_TOKENS})
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_PIXELS),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=_CHAT_TEMPLATE,
    )


def _tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return _SPECIAL_TOKENS + sorted(ByteLevel.alphabet())


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(_tokens())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL_TOKENS[0],
        bos_token=_SPECIAL_TOKENS[1],
        eos_token=_SPECIAL_TOKENS[2],
        additional_special_tokens=_SPECIAL_TOKENS[3:],
        model_max_length=CONTEXT_LENGTH,
        chat_template=_CHAT_TEMPLATE,
    )


def main() -> int:
    """Create a model or an adapter from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_cpu_platform.tiny_model", description=__doc__
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--kind", choices=["mha", "mla", "swa", "vision", "lora"], default="mha")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    options = parser.parse_args()
    if options.kind == "lora":
        make_lora(options.directory, options.seed)
    else:
        make(options.directory, options.kind, options.seed)
    print(options.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
