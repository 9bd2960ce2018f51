"""Which models there are: config.json to ModelSpec, and ModelSpec to a rank's decoder.

`read_spec` runs before anything heavy starts, so this module imports no torch; it reads plain JSON and
never runs code from the model folder (no trust_remote_code). Missing keys take the defaults of the
architecture's own configuration class in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import ModelSpec, RopeSpec
from engine.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from engine.load.shards import Cut, Shard
    from engine.models.decoder import Decoder
    from engine.parallel.comm import Comm
    from engine.parallel.linear import Tensors

Config = dict[str, Any]

#: Keys of a rope scaling that a rule reads, and those it cannot do without.
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_DTYPES = {"float32", "bfloat16", "float16"}


def read_spec(folder: str | Path) -> ModelSpec:
    """The shape of the model in `folder`, from config.json and generation_config.json.

    Raises ConfigError when there is no such folder or config, or the model is not supported.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"--model {folder}: there is no such folder.")
    if not (path / "config.json").is_file():
        raise ConfigError(f"--model {folder}: the folder holds no config.json, so it is not a model.")
    config = _read_json(path / "config.json")
    architecture = (config.get("architectures") or ["none"])[0]
    reader = _READERS.get(architecture)
    if reader is None:
        raise ConfigError(
            f"{path / 'config.json'}: architecture {architecture} is not supported; "
            f"supported are {', '.join(_READERS)}."
        )
    if config.get("quantization_config"):
        raise ConfigError(
            f"{path / 'config.json'}: quantised checkpoints are not supported; use the unquantised model."
        )
    generation: Config = {}
    if (path / "generation_config.json").is_file():
        generation = _read_json(path / "generation_config.json")
    try:
        return reader(architecture, config, _ids(config, generation, _DEFAULT_EOS.get(architecture, ())))
    except (TypeError, ValueError, ZeroDivisionError) as e:
        if isinstance(e, ConfigError):
            raise ConfigError(f"{path / 'config.json'}: {e}") from e
        raise ConfigError(f"{path / 'config.json'}: a value has the wrong type or size: {e}") from e


def prefix_salt(spec: ModelSpec, prompt_len: int) -> bytes:
    """What must salt the prefix cache of a prompt beside its tokens and its tenant.

    Empty for all but the models whose keys are rotated for the prompt's length (`engine.models.rope`):
    rows of different rotation must not share blocks. Always as many bytes for one model, so that it can
    be appended to any salt without two of them meeting.
    """
    rope = spec.rope
    if rope.kind == "dynamic":
        return (prompt_len if prompt_len > rope.params["max_position"] else 0).to_bytes(4, "big")
    if rope.kind == "qwen_ntk":
        doublings = (-(-prompt_len // rope.params["train_length"]) - 1).bit_length()
        return doublings.to_bytes(4, "big")
    return b""


def shards_of(spec: ModelSpec, cut: Cut) -> list[Shard]:
    """The shard plan of one rank."""
    from engine.models import decoder, qwen

    return (qwen if spec.architecture == "QWenLMHeadModel" else decoder).shards(spec, cut)


def build_model(spec: ModelSpec, tensors: Tensors, comm: Comm, max_len: int, device: torch.device) -> Decoder:
    """The decoder made of this rank's tensors, for sequences of up to `max_len` tokens."""
    from engine.models.decoder import Decoder

    return Decoder(spec, tensors, comm, max_len, device)


def _llama(architecture: str, c: Config, eos: tuple[int, ...]) -> ModelSpec:
    return _decoder(
        architecture, c, eos,
        {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
        qkv_bias=bool(c.get("attention_bias", False)),
        o_bias=bool(c.get("attention_bias", False)),
        mlp_bias=bool(c.get("mlp_bias", False)),
    )  # fmt: skip


def _mistral(architecture: str, c: Config, eos: tuple[int, ...]) -> ModelSpec:
    return _decoder(
        architecture, c, eos,
        {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072,
         "num_key_value_heads": 8},
        sliding_window=c.get("sliding_window", 4096),
    )  # fmt: skip


def _qwen2(architecture: str, c: Config, eos: tuple[int, ...]) -> ModelSpec:
    return _decoder(architecture, c, eos, _QWEN_DEFAULTS, qkv_bias=True, **_windows(c))


def _qwen3(architecture: str, c: Config, eos: tuple[int, ...]) -> ModelSpec:
    bias = bool(c.get("attention_bias", False))
    return _decoder(
        architecture, {"head_dim": 128, **c}, eos, _QWEN_DEFAULTS,
        qkv_bias=bias, o_bias=bias, qk_norm=True, **_windows(c),
    )  # fmt: skip


_QWEN_DEFAULTS = {
    "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}  # fmt: skip


def _qwen1(architecture: str, c: Config, eos: tuple[int, ...]) -> ModelSpec:
    heads = c.get("num_attention_heads", 32)
    head_dim = c.get("kv_channels", 128)
    longest = c.get("max_position_embeddings", 8192)
    train = c.get("seq_length", longest)
    dynamic = bool(c.get("use_dynamic_ntk", True))
    bias = not c.get("no_bias", True)
    return ModelSpec(
        architecture=architecture,
        vocab_size=c.get("vocab_size", 151936),
        hidden_size=c.get("hidden_size", 4096),
        intermediate_size=c.get("intermediate_size", 22016) // 2,
        num_layers=c.get("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        max_position=longest if dynamic else min(train, longest),
        rms_eps=c.get("layer_norm_epsilon", 1e-6),
        rope=RopeSpec(
            float(c.get("rotary_emb_base", 10000)),
            "qwen_ntk" if dynamic else "default",
            int(head_dim * c.get("rotary_pct", 1.0)),
            {"train_length": train} if dynamic else {},
        ),
        tie_embeddings=bool(c.get("tie_word_embeddings", False)),
        qkv_bias=True,
        o_bias=bias,
        mlp_bias=bias,
        logn_attn=bool(c.get("use_logn_attn", True)),
        train_length=train,
        dtype=_dtype(c),
        eos_token_ids=eos,
        bos_token_id=c.get("bos_token_id"),
    )


def _decoder(
    architecture: str, c: Config, eos: tuple[int, ...], defaults: dict[str, int], **flags: Any
) -> ModelSpec:
    c = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, **defaults, **c}
    if c.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {c['hidden_act']} is not supported; silu is.")
    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    kv_heads = c.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ConfigError(f"{heads} attention heads are no multiple of {kv_heads} key/value heads.")
    rope, stretch = _rope(c, head_dim)
    return ModelSpec(
        architecture=architecture,
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=stretch,
        rms_eps=c.get("rms_norm_eps", 1e-6),
        rope=rope,
        tie_embeddings=bool(c.get("tie_word_embeddings", False)),
        dtype=_dtype(c),
        eos_token_ids=eos,
        bos_token_id=c.get("bos_token_id"),
        **flags,
    )


def _rope(c: Config, head_dim: int) -> tuple[RopeSpec, int]:
    """The rope of either form of config.json, and the tokens it reaches.

    transformers 5 writes `rope_parameters`; older files have `rope_theta` and `rope_scaling`, whose
    rule is called `type` in the oldest.
    """
    p: Config = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    kind = p.get("rope_type") or p.get("type") or "default"
    if kind not in _ROPE_NEEDS:
        raise ConfigError(f"rope type {kind} is not supported; supported are {', '.join(_ROPE_NEEDS)}.")
    theta = float(p.get("rope_theta") or c.get("rope_theta") or 10_000.0)
    dim = int(head_dim * (p.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0))
    longest = c["max_position_embeddings"]
    p.setdefault("original_max_position_embeddings", longest)
    lacking = [name for name in _ROPE_NEEDS[kind] if p.get(name) is None]
    if lacking:
        raise ConfigError(f"rope type {kind} lacks {', '.join(lacking)}.")
    known = (*_ROPE_NEEDS[kind], *_YARN_OPTIONS) if kind == "yarn" else _ROPE_NEEDS[kind]
    params = {name: p[name] for name in known if p.get(name) is not None}
    if kind == "dynamic":
        params["max_position"] = longest
    if kind in ("linear", "dynamic"):
        longest = int(longest * p["factor"])
    elif kind == "yarn":
        longest = max(longest, int(p["original_max_position_embeddings"] * p["factor"]))
    return RopeSpec(theta, kind, dim, params), longest


_YARN_OPTIONS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")


def _windows(c: Config) -> dict[str, Any]:
    """Qwen2 and Qwen3: a window in the layers from max_window_layers on, or as layer_types says."""
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window", False) else None
    layers = c.get("num_hidden_layers", 32)
    if window is None:
        return {}
    types = c.get("layer_types") or [
        "sliding_attention" if i >= c.get("max_window_layers", 28) else "full_attention"
        for i in range(layers)
    ]
    full = tuple(i for i, kind in enumerate(types) if kind == "full_attention")
    return {} if len(full) == layers else {"sliding_window": window, "full_layers": full}


def _dtype(c: Config) -> str:
    named = c.get("dtype") or c.get("torch_dtype") or ("bfloat16" if c.get("bf16") else "float32")
    name = str(named).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name} is not supported; supported are {', '.join(sorted(_DTYPES))}.")
    return name


def _ids(config: Config, generation: Config, default: tuple[int, ...]) -> tuple[int, ...]:
    """The union of both files' EOS ids: a chat model often names its end of turn only in the second."""
    found: dict[int, None] = {}
    sources = [config.get("eos_token_id", list(default)), generation.get("eos_token_id")]
    for ids in sources:
        for i in ids if isinstance(ids, list) else [ids]:
            if i is not None:
                found[int(i)] = None
    return tuple(found)


def _read_json(path: Path) -> Config:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ConfigError(f"{path} is not JSON: {e}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, not an object.")
    return raw


_DEFAULT_EOS = {"LlamaForCausalLM": (2,), "MistralForCausalLM": (2,)}
_READERS: dict[str, Callable[[str, Config, tuple[int, ...]], ModelSpec]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "QWenLMHeadModel": _qwen1,
}
