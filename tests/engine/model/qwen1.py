"""A plain, unsharded QWenLMHeadModel without any cache: the reference for the engine's Qwen-1.

Written from the model's published description (Qwen technical report, arXiv 2309.16609, and the
behaviour of its modeling_qwen.py); float32, one sequence, nothing shared with the engine.
"""

from __future__ import annotations

import math

import torch

CONFIG = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "vocab_size": 1003, "hidden_size": 64,
    "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 16,
    "seq_length": 32, "max_position_embeddings": 512, "rotary_pct": 1.0, "rotary_emb_base": 10000,
    "layer_norm_epsilon": 1e-6, "use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip


def tensor_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint."""
    d, width, ff = c["hidden_size"], c["num_attention_heads"] * c["kv_channels"], c["intermediate_size"] // 2
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (c["vocab_size"], d)}
    for i in range(c["num_hidden_layers"]):
        p = f"transformer.h.{i}"
        shapes |= {
            f"{p}.ln_1.weight": (d,), f"{p}.ln_2.weight": (d,),
            f"{p}.attn.c_attn.weight": (3 * width, d), f"{p}.attn.c_attn.bias": (3 * width,),
            f"{p}.attn.c_proj.weight": (d, width),
            f"{p}.mlp.w1.weight": (ff, d), f"{p}.mlp.w2.weight": (ff, d), f"{p}.mlp.c_proj.weight": (d, ff),
        }  # fmt: skip
        if not c["no_bias"]:
            shapes |= {
                f"{p}.attn.c_proj.bias": (d,), f"{p}.mlp.w1.bias": (ff,), f"{p}.mlp.w2.bias": (ff,),
                f"{p}.mlp.c_proj.bias": (d,),
            }  # fmt: skip
    return shapes | {"transformer.ln_f.weight": (d,), "lm_head.weight": (c["vocab_size"], d)}


class Reference:
    """logits() of a whole sequence; generate() repeats it for each token."""

    def __init__(self, config: dict, tensors: dict[str, torch.Tensor]) -> None:
        self.c, self.w = config, tensors

    def ntk_alpha(self, prompt_len: int) -> float:
        """get_ntk_alpha: taken from the prompt at its first forward pass, then kept while decoding."""
        if not self.c["use_dynamic_ntk"]:
            return 1.0
        return max(2 ** math.ceil(math.log(prompt_len / self.c["seq_length"], 2) + 1) - 1, 1)

    @torch.no_grad()
    def logits(self, ids: list[int], prompt_len: int) -> torch.Tensor:
        """[tokens, vocab] of a row whose prompt had `prompt_len` tokens."""
        c, w = self.c, self.w
        n, heads, dim = len(ids), c["num_attention_heads"], c["kv_channels"]
        base = c["rotary_emb_base"] * self.ntk_alpha(prompt_len) ** (dim / (dim - 2))
        freqs = torch.outer(torch.arange(n).float(), 1.0 / base ** (torch.arange(0, dim, 2).float() / dim))
        emb = torch.cat([freqs, freqs], dim=-1)[:, None]
        logn = torch.ones(n)
        if c["use_logn_attn"]:
            trained = c["seq_length"]
            logn = torch.tensor([math.log(i, trained) if i > trained else 1.0 for i in range(1, n + 1)])

        def rotate(x: torch.Tensor) -> torch.Tensor:
            a, b = x.chunk(2, dim=-1)
            return x * emb.cos() + torch.cat([-b, a], dim=-1) * emb.sin()

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + c["layer_norm_epsilon"]) * w[name]

        def linear(x: torch.Tensor, name: str) -> torch.Tensor:
            return torch.nn.functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

        x = w["transformer.wte.weight"][torch.tensor(ids)]
        for i in range(c["num_hidden_layers"]):
            p = f"transformer.h.{i}"
            q, k, v = linear(norm(x, f"{p}.ln_1.weight"), f"{p}.attn.c_attn").view(n, 3, heads, dim).unbind(1)
            q, k = rotate(q) * logn[:, None, None], rotate(k)
            scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
            scores += torch.full((n, n), -torch.inf).triu(1)
            o = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(n, heads * dim)
            x = x + linear(o, f"{p}.attn.c_proj")
            h = norm(x, f"{p}.ln_2.weight")
            gated = linear(h, f"{p}.mlp.w1") * torch.nn.functional.silu(linear(h, f"{p}.mlp.w2"))
            x = x + linear(gated, f"{p}.mlp.c_proj")
        return linear(norm(x, "transformer.ln_f.weight"), "lm_head")

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        ids = list(prompt)
        for _ in range(tokens):
            ids.append(int(self.logits(ids, len(prompt))[-1].argmax()))
        return ids[len(prompt) :]
