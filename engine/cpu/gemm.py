"""The C++ matrix product on torch tensors: pack a weight once, multiply by it (`gemm.cpp`).

`Panels.of` returns None where the kernel does not apply (no compiler, no AVX-512, another dtype or device,
odd sizes), and its caller uses torch.

Suffixes: T tokens, I input features, O output features.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from engine.cpu.kernels import NAMES, kernel
from engine.cpu.memory import zeros

#: Outputs of a panel of the packed weight (`gemm.cpp`).
PANEL = 64
#: Pieces that a sum over inputs is added from where ranks may hold them: 1, 2 and 4 ranks give equal bits.
PARTS = 4


class Finish(enum.IntEnum):
    """What the kernel does to a finished sum (`gemm.cpp`)."""

    PLAIN = 0
    SILU_MUL = 1


@dataclass(frozen=True, slots=True)
class Panels:
    """A packed weight [O, I], and its bias."""

    weight: torch.Tensor  # flat
    bias: torch.Tensor | None  # padded to whole panels
    outputs: int
    inputs: int
    finish: Finish = Finish.PLAIN
    parts: int = 1

    @classmethod
    def of(
        cls, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, gated: bool = False, parts: int = 1
    ) -> Panels | None:
        """Pack a weight. `gated`: rows are gates, then as many ups, and the product is silu(gate) * up.

        `parts`: pieces of the sum; 1 where the inputs cannot be cut so.
        """
        outputs, inputs = weight_OI.shape
        side = 4 // weight_OI.element_size()
        if weight_OI.device.type != "cpu" or weight_OI.dtype not in NAMES or inputs % side:
            return None
        if gated and outputs % PANEL:
            return None
        pack = kernel("pack", weight_OI.dtype)
        if pack is None:
            return None
        if gated:
            order = gated_order(outputs)
            weight_OI = weight_OI[order]
            bias_O = None if bias_O is None else bias_O[order]
        weight_OI = weight_OI.contiguous()
        padded = -(-outputs // PANEL) * PANEL
        packed = zeros((padded * inputs,), weight_OI.dtype)
        pack(packed.data_ptr(), weight_OI.data_ptr(), outputs, inputs, torch.get_num_threads())
        return cls(
            packed, padded_bias(bias_O, padded), outputs // 2 if gated else outputs, inputs,
            Finish.SILU_MUL if gated else Finish.PLAIN, 1 if inputs % (parts * side) else parts,
        )  # fmt: skip

    def __call__(self, x_TI: torch.Tensor, wide: bool = False) -> torch.Tensor:
        """The product [T, O], rounded to x's dtype; `wide` keeps the float32 sums."""
        if x_TI.stride(1) != 1:
            x_TI = x_TI.contiguous()
        y_TO = torch.empty(x_TI.shape[0], self.outputs, dtype=torch.float32 if wide else x_TI.dtype)
        run = kernel("linear", x_TI.dtype)
        run(
            y_TO.data_ptr(), x_TI.data_ptr(), self.weight.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            x_TI.shape[0], self.inputs, self.outputs, x_TI.stride(0), self.outputs,
            self.parts, self.finish, wide, torch.get_num_threads(),
        )  # fmt: skip
        return y_TO

    def rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, [T, I]: the embedding out of a tied head, without a second copy of it."""
        out_TI = torch.empty(ids_T.shape[0], self.inputs, dtype=self.weight.dtype)
        kernel("unpack_rows", self.weight.dtype)(
            out_TI.data_ptr(), self.weight.data_ptr(), ids_T.data_ptr(), ids_T.shape[0], self.inputs
        )
        return out_TI


def gated_order(outputs: int) -> torch.Tensor:
    """Rows in the order of panels: half a panel of gates, then the ups that belong to them."""
    return torch.arange(outputs).view(2, -1, PANEL // 2).transpose(0, 1).flatten()


def padded_bias(bias_O: torch.Tensor | None, padded: int) -> torch.Tensor | None:
    """The bias with zeros up to whole panels."""
    if bias_O is None:
        return None
    return torch.nn.functional.pad(bias_O, (0, padded - bias_O.shape[0])).contiguous()
