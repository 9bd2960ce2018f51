"""Decoding steps as CUDA graphs: one recorded forward pass for each padded number of rows, replayed.

A decoding step of a small model is some 300 launches, which the host needs longer for than the GPU; a
graph is one. It reads its inputs from buffers that stay where they are: a step's numbers are written to
pinned memory, of which there are two sets, so that the host fills one while the device still reads the
other. Token ids never visit the host: a graph takes each row's newest one from `Rows.last_R`. Steps with
prompt tokens are not recorded; the worker computes them launch by launch.

Recording is handed in, and on a CPU the pass is simply run again: that is what the tests do. State: the
recording itself has not been run on a GPU yet.

Suffixes: B rows of a graph, padding included; R rows of the worker; D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from engine.attn.base import AttentionBackend
from engine.config import NULL_BLOCK
from engine.exec.wire import RowStep
from engine.models.decoder import Decoder
from engine.worker.rows import Rows

#: What the host writes for each row of a step.
ROW, POSITION, SLOT, PROMPT_LEN = range(4)
#: Steps whose inputs may be on their way: one computes while the next is launched.
SETS = 2

Pass = Callable[[], torch.Tensor]
Record = Callable[[Pass], Pass]


@runtime_checkable
class DecodingBackend(AttentionBackend, Protocol):
    """A backend whose decoding steps can be recorded; `engine.attn.triton_paged` is one."""

    def begin_decoding(
        self, starts_R: torch.Tensor, rows_R1: torch.Tensor, tables_RB: torch.Tensor, slots_R: torch.Tensor
    ) -> None: ...


def sizes(max_rows: int) -> list[int]:
    """Numbers of rows that have a graph: 1, 2, 4, multiples of 8, of 16 from 128 on, of 64 from 512 on."""
    some = [1, 2, 4, *range(8, 128, 8), *range(128, 512, 16), *range(512, max_rows + 64, 64)]
    return [*(n for n in some if n < max_rows), max_rows]


class Staging:
    """The inputs of a step, from the host's arrays to the device's buffers, without waiting for the device
    unless it is two steps behind."""

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        self.fields_4R = torch.zeros((4, max_rows), dtype=torch.int64, device=device)
        self.tables_RB = torch.full((max_rows, max_blocks), NULL_BLOCK, dtype=torch.int32, device=device)
        self._flat = torch.zeros(max_rows * max_blocks, dtype=torch.int32, device=device)
        on_gpu = device.type == "cuda"
        self._fields = [
            torch.zeros_like(self.fields_4R, device="cpu", pin_memory=on_gpu) for _ in range(SETS)
        ]
        self._tables = [torch.zeros_like(self._flat, device="cpu", pin_memory=on_gpu) for _ in range(SETS)]
        self._read: list[torch.cuda.Event | None] = [
            torch.cuda.Event() if on_gpu else None for _ in range(SETS)
        ]
        self._next = 0

    def send(self, fields_4B: np.ndarray, tables_BX: np.ndarray) -> None:
        """Fields of B rows, padding included, and the first X blocks of the first rows' tables."""
        i, self._next = self._next, (self._next + 1) % SETS
        read = self._read[i]
        if read is not None:
            read.synchronize()  # the copies of two steps ago; an event that was never recorded is past
        rows, blocks = tables_BX.shape
        self._fields[i].numpy()[:, : fields_4B.shape[1]] = fields_4B
        self._tables[i].numpy()[: tables_BX.size] = tables_BX.ravel()
        self.fields_4R.copy_(self._fields[i], non_blocking=True)
        # In one piece over the bus; rows lie apart on the device only.
        self._flat[: tables_BX.size].copy_(self._tables[i][: tables_BX.size], non_blocking=True)
        if read is not None:
            read.record()
        self.tables_RB[:rows, :blocks] = self._flat[: tables_BX.size].view(rows, blocks)


class DecodeGraphs:
    """All graphs of one worker, recorded when it is built (largest first: the others fit into its memory)."""

    def __init__(
        self, model: Decoder, attention: DecodingBackend, rows: Rows, block_size: int, record: Record
    ) -> None:  # fmt: skip
        max_rows, max_blocks = rows.tables_RB.shape
        device = rows.last_R.device
        self.model, self.attention, self.rows, self.block_size = model, attention, rows, block_size
        self.staging = Staging(max_rows, max_blocks, device)
        self.numbers_R1 = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self.sizes = np.array(sizes(max_rows))
        self.staging.fields_4R[PROMPT_LEN] = 1
        self._passes = {b: record(self._pass(b)) for b in sizes(max_rows)[::-1]}

    def run(self, steps: list[RowStep]) -> torch.Tensor | None:
        """Hidden states [B, D] of a step in which every row computes the token it sampled last, in the
        steps' order with padding rows at the end; None where this is not such a step."""
        number = len(steps)
        row_B, start_B, count_B, sample_B = np.array([s[:4] for s in steps], np.int64).T
        if count_B.max() > 1 or not sample_B.all() or (start_B < self.rows.known_R[row_B]).any():
            return None
        size = int(self.sizes[np.searchsorted(self.sizes, number)])
        block_B, offset_B = np.divmod(start_B, self.block_size)
        fields_4B = np.zeros((4, size), np.int64)  # padding: row 0's token, into the null block
        fields_4B[PROMPT_LEN] = 1
        fields_4B[ROW, :number] = row_B
        fields_4B[POSITION, :number] = start_B
        fields_4B[SLOT, :number] = self.rows.tables_RB[row_B, block_B] * np.int64(self.block_size) + offset_B
        fields_4B[PROMPT_LEN, :number] = self.rows.prompt_lens_R[row_B]
        self.staging.send(fields_4B, self.rows.tables_RB[row_B, : int(block_B.max()) + 1])
        return self._passes[size]()

    def sent(self, field: int, number: int) -> torch.Tensor:
        """One of the fields of the step that was sent last, on the device: its first `number` rows."""
        return self.staging.fields_4R[field, :number]

    def _pass(self, size: int) -> Pass:
        fields_4B = self.staging.fields_4R[:, :size]
        tables_BX = self.staging.tables_RB[:size]

        def forward() -> torch.Tensor:
            positions_B = fields_4B[POSITION]
            self.attention.begin_decoding(
                positions_B, self.numbers_R1[: size + 1], tables_BX, fields_4B[SLOT]
            )
            ids_B = self.rows.last_R[fields_4B[ROW]]
            return self.model.forward(ids_B, positions_B, fields_4B[PROMPT_LEN], self.attention)

        return forward


class CudaRecorder:
    """Records passes as CUDA graphs that share one pool of memory, as they never run at the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Pass) -> Pass:
        self._warm_up(function)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = function()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay

    def _warm_up(self, function: Pass) -> None:
        """Kernels are compiled and libraries set up outside of the recording, which allows neither."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            function()
        torch.cuda.current_stream().wait_stream(aside)
