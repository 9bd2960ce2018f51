"""QWenLMHeadModel (Qwen-7B-Chat, Qwen-14B-Chat and their kin): its tensors by name.

The forward pass is `engine.models.decoder`'s; what differs is declared here. Written from the published
modeling_qwen.py: `c_attn` is q, k and v in one tensor; `w2` is the gate (silu goes on its output) and
`w1` the other factor; config.json's intermediate_size counts both; biases, where `no_bias` is false, on
every projection, and on `c_attn` always. Its dynamic NTK is in `engine.models.rope`, its log-n scaling
of queries in the decoder.
"""

from __future__ import annotations

from engine.config import ModelSpec
from engine.load.shards import Cut, Part, Shard
from engine.models.decoder import HEAD


def shards(spec: ModelSpec, cut: Cut) -> list[Shard]:
    """Every tensor of one rank."""
    d, h = spec.hidden_size, spec.head_dim
    width = spec.num_heads * h
    out = [cut.vocab("embed.weight", "transformer.wte.weight", spec.vocab_size, d)]
    for i in range(spec.num_layers):
        src, dst = f"transformer.h.{i}", f"layers.{i}"

        def qkv_parts(kind: str, src: str = src) -> list[Part]:
            source = f"{src}.attn.c_attn.{kind}"
            return [Part(source, spec.num_heads, h, first * width, 3 * width) for first in range(3)]

        def mlp_parts(kind: str, src: str = src) -> list[Part]:
            return [Part(f"{src}.mlp.{name}.{kind}", spec.intermediate_size) for name in ("w2", "w1")]

        out += [
            cut.replicated(f"{dst}.attn_norm.weight", f"{src}.ln_1.weight", (d,)),
            cut.columns(f"{dst}.qkv.weight", qkv_parts("weight"), d),
            cut.columns(f"{dst}.qkv.bias", qkv_parts("bias"), None),
            cut.rows(f"{dst}.o.weight", f"{src}.attn.c_proj.weight", d, width),
            cut.replicated(f"{dst}.mlp_norm.weight", f"{src}.ln_2.weight", (d,)),
            cut.columns(f"{dst}.gate_up.weight", mlp_parts("weight"), d),
            cut.rows(f"{dst}.down.weight", f"{src}.mlp.c_proj.weight", d, spec.intermediate_size),
        ]
        if spec.o_bias:
            out.append(cut.first_rank_only(f"{dst}.o.bias", f"{src}.attn.c_proj.bias", d))
        if spec.mlp_bias:
            out.append(cut.columns(f"{dst}.gate_up.bias", mlp_parts("bias"), None))
            out.append(cut.first_rank_only(f"{dst}.down.bias", f"{src}.mlp.c_proj.bias", d))
    out.append(cut.replicated("norm.weight", "transformer.ln_f.weight", (d,)))
    if not spec.tie_embeddings:
        out.append(cut.vocab("head.weight", HEAD, spec.vocab_size, d))
    return out
