"""Tiny random checkpoints of every supported family, made with transformers' own classes.

All weights are random, biases and norms too, and large enough that greedy ids vary: a bias that is
added twice or a norm that is skipped changes the logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from tests.engine.model import qwen1

#: Not divisible by 2 or 4, so that vocabulary shards are padded.
VOCAB = 1003
BASE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

#: By name: (transformers' family, settings beside BASE).
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {
        "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
                            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 64},
    }),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {
        "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1,
    }),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 24}),
    "qwen3-untied": ("Qwen3", {"attention_bias": True, "head_dim": 16, "num_key_value_heads": 4}),
}  # fmt: skip


def build(folder: Path, family: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """Write a checkpoint of the family into `folder`; returns transformers' model of it."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**BASE | settings | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomise(model.named_parameters())
    model.save_pretrained(folder)
    return model


def build_qwen1(folder: Path, seed: int = 0, **changes: object) -> qwen1.Reference:
    """Write a checkpoint with Qwen-1's tensor names; returns the plain reference of it."""
    config = qwen1.CONFIG | changes
    torch.manual_seed(seed)
    tensors = {name: torch.empty(shape) for name, shape in qwen1.tensor_shapes(config).items()}
    randomise(tensors.items())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return qwen1.Reference(config, tensors)


def randomise(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        for name, t in tensors:
            if name.endswith("bias"):
                t.normal_(0.0, 0.3)
            elif t.dim() == 1:
                t.normal_(0.0, 0.3).add_(1.0)
            else:
                t.normal_(0.0, 0.15)


def prompt(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()
