"""One rank: its device, its shard of the model, its KV cache, and the step that a plan describes.

Executors build one per rank and call the verbs in order: init_device, load, allocate, then run for
every plan, and close. Every rank is sent the same plans and makes the same calls; only rank 0 answers.
Knows nothing of scheduling, queues or text.

Suffixes: T tokens, D hidden, S sampled rows, P scored prompt positions, V this rank's vocabulary.
"""

from __future__ import annotations

import logging
import os
import socket
import time

import numpy as np
import torch

from engine.attn.base import AttentionBackend, AttnStep, attn_shape, choose
from engine.config import EngineConfig, ModelSpec, context_length
from engine.cpu.kernels import kernel
from engine.errors import CheckpointError, ConfigError
from engine.exec.base import RankReport
from engine.exec.wire import StepPlan, StepResult
from engine.load.checkpoint import Checkpoint, dummy_shards, load_shards
from engine.load.shards import Cut, owned
from engine.models.decoder import HEAD
from engine.models.registry import build_model, shards_of
from engine.parallel.comm import Comm, connect
from engine.parallel.linear import Tensors
from engine.request import TokenLogprobs
from engine.sample.output import SampleOutput
from engine.sample.sampler import Sampler
from engine.worker.batch import CPU_ROWS, Batch, build
from engine.worker.graphs import POSITION, ROW, CudaRecorder, DecodeGraphs, DecodingBackend
from engine.worker.memory import GIB, kv_blocks
from engine.worker.pending import PendingStep
from engine.worker.rows import Rows

log = logging.getLogger(__name__)

#: Bytes of float32 logits that one slice of scored prompt positions may take.
SCORE_BYTES = 32 << 20
#: A collective that waits longer than this, or than two slow steps, means a dead peer.
COLLECTIVE_TIMEOUT_S = 300.0


class Worker:
    """Rank `rank` of `world`. Building one is cheap; `init_device` is the first call that is not."""

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, rank: int, world: int, init_method: str | None
    ) -> None:
        self.config = config
        self.spec = spec
        self.rank = rank
        self.world = world
        self.init_method = init_method
        self.max_len = context_length(spec, config)
        self.comm = Comm()
        self.attention: AttentionBackend
        self.graphs: DecodeGraphs | None = None

    def init_device(self) -> None:
        """Device, threads and process group, in an order that matters.

        Ray sets NCCL_ASYNC_ERROR_HANDLING, which breaks CUDA graphs; it goes first. The group is joined,
        and cuBLAS has its workspace, before anyone measures free memory: their buffers must not be
        counted as free. Raises ConfigError for a device or dtype that this machine lacks.
        """
        os.environ.pop("NCCL_ASYNC_ERROR_HANDLING", None)
        self.device = _device(self.config)
        self.dtype = _dtype(self.config, self.spec, self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.cuda.empty_cache()
        else:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(self.config.num_threads or max(1, cores // self.world))
        timeout = max(COLLECTIVE_TIMEOUT_S, 2 * self.config.step_timeout_s)
        self.comm = connect(self.rank, self.world, self.init_method, self.device, timeout)
        if self.config.quantization == "int8" and (
            self.device.type != "cpu" or kernel("linear_i8", self.dtype) is None
        ):
            raise ConfigError(
                "--quantization int8 needs a CPU with AVX-512 VNNI and a C++ compiler: leave it out here."
            )
        torch.manual_seed(self.config.seed)
        if self.device.type == "cuda":
            one = torch.ones(8, 8, device=self.device, dtype=self.dtype)
            torch.nn.functional.linear(one, one)

    def load(self) -> RankReport:
        """Read this rank's slices, build the model, and count the KV blocks that fit beside it."""
        began = time.perf_counter()
        plan = shards_of(self.spec, Cut(self.rank, self.world))
        if self.config.load_format == "dummy":
            tensors = dummy_shards(plan, self.dtype, self.config.seed + self.rank, self.device)
        else:
            with Checkpoint(self.config.model) as checkpoint:
                tied = HEAD if self.spec.tie_embeddings else None
                tensors = load_shards(checkpoint, plan, self.dtype, tied)
        weights = sum(t.numel() * t.element_size() for t in tensors.values()) / GIB
        tensors = Tensors({name: t.to(self.device) for name, t in tensors.items()})
        tensors.quantization = self.config.quantization
        self.model = build_model(self.spec, tensors, self.comm, self.max_len, self.device)
        if tensors:
            raise CheckpointError(f"the model does not use {', '.join(sorted(tensors))}")
        seconds = time.perf_counter() - began

        heads = owned(self.spec.num_heads, self.rank, self.world)[1]
        kv_heads = owned(self.spec.num_kv_heads, self.rank, self.world)[1]
        shape = attn_shape(self.spec, heads, kv_heads, self.config.block_size, self.dtype, self.device)
        self.attention, reason = choose(shape)
        if self.device.type == "cuda":
            self.run_largest_step()
        row_blocks = -(-self.max_len // self.config.block_size)
        blocks = kv_blocks(
            self.config, shape.block_bytes, row_blocks * self.config.max_num_seqs, self.world, self.device
        )
        kv_gib = blocks * shape.block_bytes / GIB
        log.info(
            "rank_loaded rank=%d device=%s dtype=%s weights_gib=%.4f seconds=%.2f kv_tokens=%d kv_gib=%.4f "
            "attention=%r",
            self.rank, self.device, self.dtype, weights, seconds,
            (blocks - 1) * self.config.block_size, kv_gib, reason,
        )  # fmt: skip
        return RankReport(
            self.rank, str(self.device), socket.gethostname(), weights, seconds, blocks, kv_gib, reason,
            os.getpid(),
        )  # fmt: skip

    def allocate(self, num_blocks: int) -> None:
        """Make the KV pool, the rows and the sampler; the smallest rank has decided `num_blocks`."""
        self.attention.allocate(num_blocks)
        row_blocks = -(-self.max_len // self.config.block_size)
        self.rows = Rows(self.config.max_num_seqs, row_blocks, self.device)
        head = self.model.head
        self.sampler = Sampler(
            self.comm, self.spec.vocab_size, head.start, head.end, self.config.max_num_seqs, self.device
        )
        if self.device.type == "cuda" and not self.config.enforce_eager:
            self._record()

    @torch.inference_mode()
    def _record(self) -> None:
        """CUDA graphs of decoding steps, where the backend's can be recorded. Their memory comes out of what
        --gpu-memory-utilization leaves: hidden states and activations of max_num_seqs tokens."""
        if isinstance(self.attention, DecodingBackend):
            began = time.perf_counter()
            size = self.config.block_size
            self.graphs = DecodeGraphs(self.model, self.attention, self.rows, size, CudaRecorder())
            log.info("graphs_recorded rank=%d seconds=%.2f", self.rank, time.perf_counter() - began)

    @torch.inference_mode()
    def run_largest_step(self) -> None:
        """Compute a step of max_num_batched_tokens over a pool of the null block alone.

        torch keeps the memory that its activations took, so the pool is counted from what is left.
        """
        tokens = self.config.max_num_batched_tokens
        self.attention.allocate(1)
        positions_T = torch.arange(tokens, device=self.device) % self.max_len
        size = self.config.block_size
        step = AttnStep(
            np.zeros(1, np.int64),
            np.full(1, tokens, np.int64),
            np.array([0, tokens], np.int64),
            torch.zeros(1, -(-tokens // size), dtype=torch.int32, device=self.device),
            positions_T % size,
        )
        self.attention.begin(step)
        x_TD = self.model.forward(
            positions_T % self.spec.vocab_size, positions_T, positions_T, self.attention
        )
        self.model.logits(x_TD[: self.config.max_num_seqs]).float()

    def run(self, plan: StepPlan) -> StepResult | None:
        """Compute one plan. Rank 0 returns the result, the others None."""
        pending = self.launch(plan)
        return None if pending is None else pending.result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep | None:
        """Hand one plan to the device. On a GPU this waits for nothing, unless a row asks for the
        log-probabilities of its prompt or has limits that need numbers of the device."""
        began = time.perf_counter()
        reduces = self.comm.traffic.all_reduces
        for row in plan.finished:
            self.sampler.drop_row(row)
        self.rows.apply(plan)
        for new in plan.new:
            self.sampler.add_row(new.row, new.sampling, new.tokens, new.prompt_len)
        if not plan.steps:
            return self._pending(plan, None, [], began, reduces)

        out = self._decode(plan)
        scores: list[tuple[int, int, TokenLogprobs]] = []
        if out is None:
            out, scores = self._compute(plan)
        return self._pending(plan, out, scores, began, reduces)

    def _decode(self, plan: StepPlan) -> SampleOutput | None:
        """A decoding step by its graph; None where there is none for it."""
        x_BD = None if self.graphs is None else self.graphs.run(plan.steps)
        if self.graphs is None or x_BD is None:
            return None
        rows = [s.row for s in plan.steps]
        logits_SV = self.model.logits(x_BD[: len(rows)])
        out = self.sampler.sample(logits_SV, rows, self.graphs.sent(POSITION, len(rows)) + 1)
        self.rows.last_R.index_copy_(0, self.graphs.sent(ROW, len(rows)), out.token_ids)
        return out

    def _compute(self, plan: StepPlan) -> tuple[SampleOutput | None, list[tuple[int, int, TokenLogprobs]]]:
        """Any step, launch by launch: (samples, log-probabilities of prompt tokens)."""
        batch = build(plan, self.rows, self.config.block_size, self.device)
        self.attention.begin(batch.attn)
        x_TD = self.model.forward(batch.ids_T, batch.positions_T, batch.prompt_lens_T, self.attention)
        scores = self._score(batch, x_TD) if len(batch.score_rows) else []
        if not batch.sample_rows:
            return None, scores
        logits_SV = self._logits(x_TD, batch.sample_at_S)
        out = self.sampler.sample(logits_SV, batch.sample_rows, batch.sample_positions_S)
        self.rows.last_R.index_copy_(0, batch.sample_rows_S, out.token_ids)
        return out, scores

    def _pending(
        self, plan: StepPlan, out: SampleOutput | None, scores: list[tuple[int, int, TokenLogprobs]],
        began: float, reduces: int,
    ) -> PendingStep | None:  # fmt: skip
        if self.rank:
            return None
        if out is not None:
            out.depart()
        return PendingStep(plan.step, out, scores, began, self.comm.traffic.all_reduces - reduces)

    def close(self) -> None:
        """Leave the process group."""
        self.comm.close()

    def _logits(self, x_TD: torch.Tensor, at_S: torch.Tensor) -> torch.Tensor:
        """This rank's logits of the selected tokens, with the rows padded as all CPU products are."""
        number = at_S.shape[0]
        x_SD = x_TD[at_S]
        if self.device.type != "cuda" and number % CPU_ROWS:
            x_SD = torch.nn.functional.pad(x_SD, (0, 0, 0, -number % CPU_ROWS))
        return self.model.logits(x_SD)[:number]

    def _score(self, batch: Batch, x_TD: torch.Tensor) -> list[tuple[int, int, TokenLogprobs]]:
        """Log-probabilities of prompt tokens, in slices whose logits stay small."""
        rows, positions = batch.score_rows.tolist(), batch.score_positions.tolist()
        size = max(CPU_ROWS, SCORE_BYTES // (4 * self.spec.vocab_size) // CPU_ROWS * CPU_ROWS)
        out: list[tuple[int, int, TokenLogprobs]] = []
        for begin in range(0, len(rows), size):
            part = slice(begin, begin + size)
            wanted = list(zip(rows[part], positions[part], strict=True))
            ids_P = torch.tensor(
                [int(self.rows.tokens[row][position]) for row, position in wanted],
                device=self.device,
            )
            entries = self.sampler.logprobs_of(
                self._logits(x_TD, batch.score_at_P[part]), ids_P, max(self._top_n(row) for row in rows[part])
            )
            for (row, position), entry in zip(wanted, entries, strict=True):
                top = entry.top[: self._top_n(row)]
                out.append((row, position, TokenLogprobs(entry.token_id, entry.logprob, entry.rank, top)))
        return out

    def _top_n(self, row: int) -> int:
        sampling = self.rows.sampling[row]
        return (sampling.prompt_logprobs or 0) if sampling is not None else 0


def _device(config: EngineConfig) -> torch.device:
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {config.device} is not one of auto, cpu, cuda.")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no GPU on this machine: use --device cpu.")
    if config.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", 0)  # an executor shows each rank its own GPU only
    return torch.device("cpu")


def _dtype(config: EngineConfig, spec: ModelSpec, device: torch.device) -> torch.dtype:
    name = spec.dtype if config.dtype == "auto" else config.dtype
    if name == "float16" and device.type == "cpu":
        if config.dtype == "auto":
            return torch.float32  # a float16 checkpoint read exactly; CPUs have no fast float16
        raise ConfigError("--dtype float16 is for GPUs only: use bfloat16 or float32 on a CPU.")
    return getattr(torch, name)
