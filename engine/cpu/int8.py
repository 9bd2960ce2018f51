"""W8A8 products on torch tensors: int8 weights with a scale per output, inputs rounded row by row.

The kernel is in `gemm.cpp`. `Int8Panels.of` returns None where it does not apply, and its caller keeps the
weight as it is.

Suffixes: T tokens, I input features, O output features, P parts of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.cpu.gemm import PANEL, Finish, gated_order, padded_bias
from engine.cpu.kernels import LANES, NAMES, kernel
from engine.cpu.memory import zeros

#: Inputs of a part are a multiple of this: a vector of floats becomes one of bytes, four bytes a product.
SIDE = LANES


@dataclass(frozen=True, slots=True)
class Int8Panels:
    """A packed int8 weight [O, I] for inputs of one dtype, and its bias."""

    weight: torch.Tensor  # int8, flat
    scales_O: torch.Tensor  # float32, padded to whole panels
    offsets_PO: torch.Tensor  # int32: takes the shift of the inputs out of a part's sum
    bias_O: torch.Tensor | None
    dtype: torch.dtype
    outputs: int
    inputs: int
    finish: Finish
    parts: int

    @classmethod
    def of(
        cls, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, gated: bool = False, parts: int = 1
    ) -> Int8Panels | None:
        """Round and pack a weight. Arguments as of `engine.cpu.gemm.Panels.of`."""
        outputs, inputs = weight_OI.shape
        if weight_OI.device.type != "cpu" or weight_OI.dtype not in NAMES or inputs % SIDE:
            return None
        if (gated and outputs % PANEL) or kernel("linear_i8", weight_OI.dtype) is None:
            return None
        parts = 1 if inputs % (parts * SIDE) else parts
        if gated:
            order = gated_order(outputs)
            weight_OI, bias_O = weight_OI[order], None if bias_O is None else bias_O[order]
        rounded_OI, scales_O = quantize(weight_OI)
        padded = -(-outputs // PANEL) * PANEL
        packed = zeros((padded * inputs,), torch.int8)
        kernel("pack", torch.int8)(
            packed.data_ptr(), rounded_OI.data_ptr(), outputs, inputs, torch.get_num_threads()
        )
        offsets_PO = -128 * rounded_OI.view(outputs, parts, -1).sum(-1, dtype=torch.int32).T
        pad = (0, padded - outputs)
        return cls(
            packed, torch.nn.functional.pad(scales_O, pad),
            torch.nn.functional.pad(offsets_PO, pad).contiguous(), padded_bias(bias_O, padded),
            weight_OI.dtype, outputs // 2 if gated else outputs, inputs,
            Finish.SILU_MUL if gated else Finish.PLAIN, parts,
        )  # fmt: skip

    def __call__(self, x_TI: torch.Tensor, wide: bool = False) -> torch.Tensor:
        """The product [T, O], rounded to x's dtype; `wide` keeps the float32 sums."""
        if x_TI.stride(1) != 1:
            x_TI = x_TI.contiguous()
        rows = x_TI.shape[0]
        y_TO = torch.empty(rows, self.outputs, dtype=torch.float32 if wide else x_TI.dtype)
        bytes_TI = torch.empty(rows, self.inputs, dtype=torch.uint8)
        scales_TP = torch.empty(rows, self.parts)
        kernel("linear_i8", x_TI.dtype)(
            y_TO.data_ptr(), x_TI.data_ptr(), self.weight.data_ptr(),
            None if self.bias_O is None else self.bias_O.data_ptr(),
            self.scales_O.data_ptr(), self.offsets_PO.data_ptr(), bytes_TI.data_ptr(), scales_TP.data_ptr(),
            rows, self.inputs, self.outputs, x_TI.stride(0), self.outputs,
            self.parts, self.finish, wide, torch.get_num_threads(),
        )  # fmt: skip
        return y_TO

    def rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of the weight as it is multiplied, [T, I]."""
        out_TI = torch.empty(ids_T.shape[0], self.inputs, dtype=torch.int8)
        kernel("unpack_rows", torch.int8)(
            out_TI.data_ptr(), self.weight.data_ptr(), ids_T.data_ptr(), ids_T.shape[0], self.inputs
        )
        return (out_TI * self.scales_O[ids_T, None]).to(self.dtype)


def quantize(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [O, I], float32 scales [O]): each output's largest weight becomes 127."""
    wide_OI = weight_OI.float()
    scales_O = wide_OI.abs().amax(1) / 127
    scales_O[scales_O == 0] = 1
    return (wide_OI / scales_O[:, None]).round().to(torch.int8).contiguous(), scales_O
