"""The one matrix product of the engine: x @ weight.T + bias, with the weight in its fastest form.

Knows nothing of ranks or models. Layers call `product` once, after loading, and keep what it returns.

On CPUs with AVX-512 that is the C++ kernel of `engine.cpu.gemm`, or of `engine.cpu.int8` where weights are
to be rounded; without a compiler, a bfloat16 weight is packed for oneDNN. All forms give a row the same bits
among any multiple of 8 rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from engine.cpu import ops as cpu_ops
from engine.cpu.gemm import PARTS, Panels
from engine.cpu.int8 import Int8Panels
from engine.gpu import ops as gpu_ops

#: Rows that oneDNN packs weights for; other numbers lose nothing.
PACK_ROWS = 64


class Product(Protocol):
    """[T, I] to [T, O], in x's dtype."""

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor: ...


class Tensors(dict[str, torch.Tensor]):
    """This rank's tensors by name, and the form that products hold weights in (None: as they are)."""

    quantization: str | None = None


def product(
    tensors: Mapping[str, torch.Tensor], weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None
) -> Product:
    """x @ weight.T + bias, in the form that `tensors`, where the weight came from, asks for."""
    return _panels(tensors, weight_OI, bias_O) or TorchProduct(weight_OI, bias_O)


def gated_product(
    tensors: Mapping[str, torch.Tensor], weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None
) -> Product:
    """silu(gate) * up, where the weight's first half of rows makes the gates and the second the ups."""
    gated = _panels(tensors, weight_OI, bias_O, gated=True)
    return gated or GatedProduct(product(tensors, weight_OI, bias_O))


def partial_product(
    tensors: Mapping[str, torch.Tensor], weight_OI: torch.Tensor, bias_O: torch.Tensor | None, ranks: int
) -> Product:
    """A product over this rank's part of the inputs. `ranks` of them add up to the bits of one alone, where
    the C++ kernel computes them: see `engine.cpu.gemm`."""
    parts = max(1, PARTS // ranks)
    return _panels(tensors, weight_OI, bias_O, parts=parts) or TorchProduct(weight_OI, bias_O)


def _panels(
    tensors: Mapping[str, torch.Tensor], weight_OI: torch.Tensor, bias_O: torch.Tensor | None, **how: Any
) -> Panels | Int8Panels | None:
    if getattr(tensors, "quantization", None) == "int8":
        rounded = Int8Panels.of(weight_OI, bias_O, **how)
        if rounded is not None:
            return rounded
    return Panels.of(weight_OI, bias_O, **how)


class TorchProduct:
    """By torch, and by oneDNN where it multiplies bfloat16."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self.weight, self.bias_O = weight_OI.contiguous(), bias_O
        if weight_OI.device.type == "cpu" and weight_OI.dtype == torch.bfloat16 and _onednn_bf16():
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACK_ROWS)

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        if self.weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x_TI, self.weight, self.bias_O, "none", [], "")
        return F.linear(x_TI, self.weight, self.bias_O)


class GatedProduct:
    """The gate after the product, not inside it."""

    def __init__(self, inner: Product) -> None:
        self.inner = inner

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        gate_TO, up_TO = self.inner(x_TI).chunk(2, dim=-1)
        h_TO = cpu_ops.silu_mul(gate_TO, up_TO)
        if h_TO is None:
            h_TO = gpu_ops.silu_mul(gate_TO, up_TO)
        return F.silu(gate_TO) * up_TO if h_TO is None else h_TO


def _onednn_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
