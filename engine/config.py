"""What an engine is built from: frozen values, checked here once, sent to every rank as plain data.

Nothing here imports torch, so that a bad setting is refused before anything heavy starts.
`ModelSpec` is what the rest of the engine knows of a model; reading one from a folder is
`engine.models.registry.read_spec`.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from engine.errors import ConfigError

#: dtype names of `--dtype`; "auto" takes the checkpoint's own.
DTYPES = ("auto", "float32", "bfloat16", "float16")
#: forms of weights of `--quantization`.
QUANTIZATIONS = (None, "int8")
#: executors of `--executor`.
EXECUTORS = ("inproc", "ray")
#: Block 0 of every KV pool is the null block: padding writes land there and nobody reads it.
NULL_BLOCK = 0


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding (Su et al., 2021) and its scaling; `kind` names the rule in `engine.models.rope`.

    kind: "default", "linear", "dynamic", "llama3", "yarn" or "qwen_ntk" (Qwen-1's dynamic NTK).
    `params` holds the scaling's own numbers under their config.json names.
    """

    theta: float = 10_000.0
    kind: str = "default"
    dim: int = 0  # rotated dimensions of each head; 0 means head_dim
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder-only model, read from config.json. Plain data: it travels to ranks."""

    architecture: str  # config.json's architectures[0]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_eps: float
    rope: RopeSpec
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None  # tokens a query sees, itself included; None means all
    full_layers: tuple[int, ...] = ()  # layers that ignore the sliding window
    logn_attn: bool = False  # Qwen-1: queries past the trained length are scaled by log_train(position)
    train_length: int | None = None  # Qwen-1: config's seq_length
    dtype: str = "float32"  # the checkpoint's own
    eos_token_ids: tuple[int, ...] = ()  # config and generation_config; the tokenizer's come later
    bos_token_id: int | None = None

    def to_wire(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_wire(cls, raw: dict[str, Any]) -> ModelSpec:
        raw = dict(raw, rope=RopeSpec(**raw["rope"]))
        raw |= {name: tuple(raw[name]) for name in ("eos_token_ids", "full_layers")}
        return cls(**raw)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All settings of one engine. Flag names are vLLM's. Raises ConfigError where a value is wrong."""

    model: str  # folder with config.json and *.safetensors
    dtype: str = "auto"
    executor: str = "inproc"
    tensor_parallel_size: int = 1
    max_model_len: int | None = None  # tokens, prompt + output; None means the model's own
    max_num_seqs: int = 64  # rows that run at once
    max_num_batched_tokens: int = 1024  # token budget of one step
    block_size: int = 16  # tokens per KV block
    gpu_memory_utilization: float = 0.92
    kv_cache_memory: float | None = None  # GiB per rank, for CPUs; None: what the machine can spare
    num_kv_blocks: int | None = None  # exact size of the pool, null block included; tests and benchmarks
    enable_prefix_caching: bool = True
    lookahead: int = 512  # jobs beyond the running rows whose order is planned; 0: first come, first served
    seed: int = 0
    served_model_name: str | None = None
    overlap_depth: int | None = None  # steps in flight beside the awaited one; None: CPU 0, GPU 1
    max_parallel_loading_workers: int | None = None  # ranks that load at once; None: all
    ray_address: str | None = None
    num_threads: int | None = None  # CPU threads per rank; None: cores // ranks
    step_timeout_s: float = 120.0  # a step slower than this means a hung rank
    quantization: str | None = None  # "int8": W8A8 on CPUs; None: the weights as they are
    enforce_eager: bool = False  # no CUDA graphs on a GPU
    device: str = "auto"  # "auto", "cpu" or "cuda"
    load_format: str = "safetensors"  # or "dummy": random weights of the model's shape, for benchmarks

    def __post_init__(self) -> None:
        def positive(name: str) -> None:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1.")

        for name in (
            "tensor_parallel_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
            "block_size", "num_kv_blocks", "max_parallel_loading_workers", "num_threads",
        ):  # fmt: skip
            positive(name)
        if self.lookahead < 0:
            raise ConfigError(f"--lookahead {self.lookahead} must be 0 (first come, first served) or more.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype} is not one of {', '.join(DTYPES)}.")
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"--quantization {self.quantization} is not one of {', '.join(filter(None, QUANTIZATIONS))}."
            )
        if self.executor not in EXECUTORS:
            raise ConfigError(f"--executor {self.executor} is not one of {', '.join(EXECUTORS)}.")
        if self.executor == "inproc" and self.tensor_parallel_size > 1:
            raise ConfigError(
                f"--executor inproc runs one rank, not {self.tensor_parallel_size}: use --executor ray."
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"--gpu-memory-utilization {self.gpu_memory_utilization} must be above 0 and at most 1."
            )
        if self.kv_cache_memory is not None and not self.kv_cache_memory > 0:
            raise ConfigError(f"--kv-cache-memory {self.kv_cache_memory} GiB must be above 0.")

    @property
    def model_name(self) -> str:
        """The name that completions carry."""
        return self.served_model_name or os.path.basename(os.path.normpath(self.model))


def check_parallel(spec: ModelSpec, config: EngineConfig) -> None:
    """Refuse a tensor-parallel size that cannot split the model; called before Ray starts."""
    tp = config.tensor_parallel_size
    if spec.num_heads % tp:
        raise ConfigError(
            f"Total number of attention heads ({spec.num_heads}) must be divisible by "
            f"tensor parallel size ({tp})."
        )
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        raise ConfigError(
            f"Total number of key/value heads ({spec.num_kv_heads}) must divide, or be divisible by, "
            f"tensor parallel size ({tp})."
        )
    if spec.intermediate_size % tp:
        raise ConfigError(
            f"The MLP's intermediate size ({spec.intermediate_size}) must be divisible by "
            f"tensor parallel size ({tp})."
        )


def context_length(spec: ModelSpec, config: EngineConfig) -> int:
    """Tokens that prompt and output may have together."""
    if config.max_model_len is None:
        return spec.max_position
    if config.max_model_len > spec.max_position:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} exceeds the model's own {spec.max_position}."
        )
    return config.max_model_len
