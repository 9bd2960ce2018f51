"""The sampler's definition, written plainly: one row, the whole vocabulary, Python integers and floats.

It shares no code with engine.sample. The noise is computed token by token with Python integers, so it is
also the specification of the hash.
"""

from __future__ import annotations

import math

import torch

from engine.request import Sampling

M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def noise_bits(seed: int, position: int, token: int) -> int:
    key = mix64((mix64((seed + 0x9E3779B97F4A7C15) & M64) + position) & M64)
    x = token
    x ^= x >> 16
    x = (x * 0x7FEB352D) & M32
    x ^= x >> 15
    x = (x * 0x846CA68B) & M32
    x ^= x >> 16
    x ^= key & M32
    x = (x * 0x7FEB352D) & M32
    x ^= x >> 15
    x ^= key >> 32
    x = (x * 0x846CA68B) & M32
    x ^= (x >> 16) | (0xFFFF0000 if x >> 31 else 0)
    return x & 0x7FFFFFFF


def gumbel(seed: int, position: int, token: int) -> float:
    w = (noise_bits(seed, position, token) + 0.5) / 2**31
    return -math.log(-math.log1p(-w))


def edited(logits_V: torch.Tensor, s: Sampling, tokens: list[int], prompt_len: int) -> torch.Tensor:
    """logit_bias, min_tokens, penalties on float32 logits."""
    out = logits_V.float().clone()
    for token, bias in s.logit_bias.items():
        out[token] += bias
    if len(tokens) - prompt_len < s.min_tokens:
        for token in s.stop_token_ids:
            out[token] = -math.inf
    for token in set(tokens):
        x = out[token]
        out[token] = x / s.repetition_penalty if x > 0 else x * s.repetition_penalty
    output = tokens[prompt_len:]
    for token in set(output):
        out[token] -= s.frequency_penalty * output.count(token)
        out[token] -= s.presence_penalty
    return out


def kept(scaled_V: torch.Tensor, s: Sampling) -> torch.Tensor:
    """Bool [V]: the tokens that min_p, top_k and top_p leave, by sorting."""
    keep = scaled_V > -math.inf
    p = scaled_V.double().softmax(0)
    keep &= p >= s.min_p * p.max()
    if 0 < s.top_k < len(scaled_V):
        left = scaled_V.masked_fill(~keep, -math.inf)
        keep &= scaled_V >= left.topk(s.top_k).values[-1]
    if s.top_p < 1:
        p = scaled_V.masked_fill(~keep, -math.inf).double().softmax(0)
        ordered, _order = p.sort(descending=True)
        above = ordered.cumsum(0) - ordered
        least = ordered[above < s.top_p].min()
        keep &= p >= least
    return keep


def choose(logits_V: torch.Tensor, s: Sampling, tokens: list[int], prompt_len: int) -> int:
    """The token that stands at position len(tokens)."""
    values_V = edited(logits_V, s, tokens, prompt_len)
    if s.temperature < 1e-5:
        return int(values_V.argmax())
    scaled_V = values_V / torch.tensor(s.temperature)
    best, winner = -math.inf, -1
    for token in kept(scaled_V, s).nonzero()[:, 0].tolist():
        score = scaled_V[token].item() + gumbel(s.seed, len(tokens), token)
        if score > best:
            best, winner = score, token
    return winner
