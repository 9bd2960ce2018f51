"""The decoder-only transformer: Llama, Mistral, Qwen2 and Qwen3 by the flags of ModelSpec, and Qwen-1.

Knows nothing of requests, sampling or files: token ids and positions in, this rank's logits out. Which
checkpoint tensors it is made of is declared beside it (`shards`); Qwen-1's other names are in
`engine.models.qwen`.

Suffixes: T tokens of the step, S selected tokens, D hidden, N query heads, K KV heads, H head size,
V this rank's vocabulary, O output features of this rank, X all heads (N + 2K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attn.base import AttentionBackend, HeadWork
from engine.config import ModelSpec
from engine.load.shards import Cut, Part, Shard
from engine.models.norm import RMSNorm
from engine.models.rope import Rope, rotate
from engine.parallel.comm import Comm
from engine.parallel.layers import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from engine.parallel.linear import Tensors, product
from engine.parallel.vocab import ParallelLMHead, VocabParallelEmbedding, tied

#: The source of a tied head: a checkpoint may carry the alias or leave it out.
HEAD = "lm_head.weight"


def shards(spec: ModelSpec, cut: Cut) -> list[Shard]:
    """Every tensor of one rank, from transformers' names for these four families."""
    d, h = spec.hidden_size, spec.head_dim
    out = [cut.vocab("embed.weight", "model.embed_tokens.weight", spec.vocab_size, d)]
    for i in range(spec.num_layers):
        src, dst = f"model.layers.{i}", f"layers.{i}"
        qkv = [("q", spec.num_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads)]
        mlp = [("gate", spec.intermediate_size), ("up", spec.intermediate_size)]

        def qkv_parts(kind: str, src: str = src, qkv: list = qkv) -> list[Part]:
            return [Part(f"{src}.self_attn.{name}_proj.{kind}", heads, h) for name, heads in qkv]

        def mlp_parts(kind: str, src: str = src, mlp: list = mlp) -> list[Part]:
            return [Part(f"{src}.mlp.{name}_proj.{kind}", rows) for name, rows in mlp]

        out += [
            cut.replicated(f"{dst}.attn_norm.weight", f"{src}.input_layernorm.weight", (d,)),
            cut.columns(f"{dst}.qkv.weight", qkv_parts("weight"), d),
            cut.rows(f"{dst}.o.weight", f"{src}.self_attn.o_proj.weight", d, spec.num_heads * h),
            cut.replicated(f"{dst}.mlp_norm.weight", f"{src}.post_attention_layernorm.weight", (d,)),
            cut.columns(f"{dst}.gate_up.weight", mlp_parts("weight"), d),
            cut.rows(f"{dst}.down.weight", f"{src}.mlp.down_proj.weight", d, spec.intermediate_size),
        ]
        if spec.qkv_bias:
            out.append(cut.columns(f"{dst}.qkv.bias", qkv_parts("bias"), None))
        if spec.o_bias:
            out.append(cut.first_rank_only(f"{dst}.o.bias", f"{src}.self_attn.o_proj.bias", d))
        if spec.mlp_bias:
            out.append(cut.columns(f"{dst}.gate_up.bias", mlp_parts("bias"), None))
            out.append(cut.first_rank_only(f"{dst}.down.bias", f"{src}.mlp.down_proj.bias", d))
        if spec.qk_norm:
            out.append(cut.replicated(f"{dst}.q_norm.weight", f"{src}.self_attn.q_norm.weight", (h,)))
            out.append(cut.replicated(f"{dst}.k_norm.weight", f"{src}.self_attn.k_norm.weight", (h,)))
    out.append(cut.replicated("norm.weight", "model.norm.weight", (d,)))
    if not spec.tie_embeddings:
        out.append(cut.vocab("head.weight", HEAD, spec.vocab_size, d))
    return out


@dataclass(frozen=True, slots=True)
class Angles:
    """What the layers of one step share about positions."""

    cos: torch.Tensor  # float32 [T, 1, rotated / 2]
    sin: torch.Tensor
    logn: torch.Tensor | None  # float32 [T, 1, 1]: Qwen-1's factor on queries


class Decoder:
    """A model whose tensors are this rank's shards. Takes everything out of `tensors`."""

    def __init__(
        self, spec: ModelSpec, tensors: Tensors, comm: Comm, max_len: int, device: torch.device
    ) -> None:
        self.spec = spec
        self.rope = Rope(spec, max_len, device)
        embed_VD = tensors.pop("embed.weight")
        if spec.tie_embeddings:
            self.embed, self.head = tied(tensors, embed_VD, spec.vocab_size, comm)
        else:
            self.embed = VocabParallelEmbedding(embed_VD, spec.vocab_size, comm)
            self.head = ParallelLMHead(product(tensors, tensors.pop("head.weight")), spec.vocab_size, comm)
        del embed_VD
        self.layers = [DecoderLayer(spec, tensors, i, comm) for i in range(spec.num_layers)]
        self.norm = RMSNorm(tensors.pop("norm.weight"), spec.rms_eps)

    def forward(
        self,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        prompt_lens_T: torch.Tensor,
        attention: AttentionBackend,
    ) -> torch.Tensor:
        """Hidden states [T, D] before the final norm; keys and values go to `attention`'s cache."""
        angles = self._angles(positions_T, prompt_lens_T)
        x_TD = self.embed(ids_T)
        delta_TD = None
        for layer in self.layers:
            x_TD, delta_TD = layer(x_TD, delta_TD, angles, attention)
        return x_TD if delta_TD is None else x_TD + delta_TD

    def logits(self, x_SD: torch.Tensor) -> torch.Tensor:
        """This rank's logits [S, V] of selected hidden states."""
        return self.head(self.norm(x_SD))

    def _angles(self, positions_T: torch.Tensor, prompt_lens_T: torch.Tensor) -> Angles:
        cos, sin = self.rope.angles(positions_T, prompt_lens_T)
        logn = None
        if self.spec.logn_attn and self.spec.train_length:
            # modeling_qwen.py: log base seq_length of the token's number, counted from 1, where it is
            # beyond seq_length.
            number_T = (positions_T + 1).clamp(min=self.spec.train_length).double()
            base = torch.tensor(float(self.spec.train_length), dtype=torch.float64).log()
            logn = (number_T.log() / base).float()[:, None, None]
        return Angles(cos, sin, logn)


class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)): two all-reduces."""

    def __init__(self, spec: ModelSpec, tensors: Tensors, index: int, comm: Comm) -> None:
        name = f"layers.{index}"
        self.index = index
        self.attn_norm = RMSNorm(tensors.pop(f"{name}.attn_norm.weight"), spec.rms_eps)
        self.qkv = QKVParallelLinear(
            tensors, f"{name}.qkv", spec.num_heads, spec.num_kv_heads, spec.head_dim, comm
        )
        self.q_norm = self.k_norm = None
        if spec.qk_norm:
            self.q_norm = RMSNorm(tensors.pop(f"{name}.q_norm.weight"), spec.rms_eps)
            self.k_norm = RMSNorm(tensors.pop(f"{name}.k_norm.weight"), spec.rms_eps)
        self.o = RowParallelLinear(tensors, f"{name}.o", comm)
        self.mlp_norm = RMSNorm(tensors.pop(f"{name}.mlp_norm.weight"), spec.rms_eps)
        self.gate_up = MergedColumnParallelLinear(tensors, f"{name}.gate_up")
        self.down = RowParallelLinear(tensors, f"{name}.down", comm)

    def __call__(
        self, x_TD: torch.Tensor, delta_TD: torch.Tensor | None, angles: Angles, attention: AttentionBackend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, what is still to be added to it), from the same of the layer before: a GPU adds within the
        norm that reads the sum."""
        x_TD, h_TD = self.attn_norm.after_adding(x_TD, delta_TD)
        x_TD, h_TD = self.mlp_norm.after_adding(x_TD, self._attention(h_TD, angles, attention))
        return x_TD, self.down(self.gate_up(h_TD))

    def _attention(self, x_TD: torch.Tensor, angles: Angles, attention: AttentionBackend) -> torch.Tensor:
        heads, kv_heads = self.qkv.num_heads, self.qkv.num_kv_heads
        qkv_TXH = self.qkv(x_TD)
        if attention.attend_heads is not None:
            return self.o(attention.attend_heads(self.index, qkv_TXH, self._work(angles)).flatten(1))
        q_TNH, k_TKH, v_TKH = qkv_TXH.split([heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        q_TNH = rotate(q_TNH, angles.cos, angles.sin)
        k_TKH = rotate(k_TKH, angles.cos, angles.sin)
        if angles.logn is not None:
            q_TNH = (q_TNH * angles.logn).to(q_TNH.dtype)
        return self.o(attention.attend(self.index, q_TNH, k_TKH, v_TKH).flatten(1))

    def _work(self, angles: Angles) -> HeadWork:
        if self.q_norm is None or self.k_norm is None:
            return HeadWork(angles.cos, angles.sin, angles.logn)
        q, k = self.q_norm, self.k_norm
        return HeadWork(angles.cos, angles.sin, angles.logn, q.weight, k.weight, q.eps)
