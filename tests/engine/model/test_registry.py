"""config.json becomes a ModelSpec as transformers would read it, without running anything from the folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import pytest
import transformers

from engine.config import ModelSpec
from engine.errors import ConfigError
from engine.models.registry import prefix_salt, read_spec


def write(folder: Path, config: Any, generation: Any = None) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_missing_keys_take_transformers_defaults(tmp_path: Path, family: str) -> None:
    spec = read_spec(write(tmp_path, {"architectures": [f"{family}ForCausalLM"]}))
    c = getattr(transformers, f"{family}Config")()
    assert (spec.vocab_size, spec.hidden_size, spec.intermediate_size, spec.num_layers) == (
        c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers,
    )  # fmt: skip
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (
        c.num_attention_heads, c.num_key_value_heads, getattr(c, "head_dim", 128),
    )  # fmt: skip
    assert (spec.max_position, spec.rms_eps, spec.tie_embeddings, spec.sliding_window) == (
        c.max_position_embeddings, c.rms_norm_eps, c.tie_word_embeddings,
        4096 if family == "Mistral" else None,
    )  # fmt: skip
    assert spec.rope.theta == c.rope_parameters["rope_theta"]
    assert spec.eos_token_ids == (() if c.eos_token_id is None else (c.eos_token_id,))


def test_both_rope_forms_read_alike(tmp_path: Path) -> None:
    numbers = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip

    def read(**rope: Any) -> ModelSpec:
        return read_spec(write(tmp_path, {"architectures": ["LlamaForCausalLM"], **rope}))

    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **numbers})
    old = read(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **numbers})
    oldest = read(rope_theta=5e5, rope_scaling={"type": "llama3", **numbers})
    assert new == old == oldest
    assert new.rope.kind == "llama3"
    assert new.rope.theta == 5e5


@pytest.mark.parametrize(
    ("rope", "kind", "reach"),
    [
        ({"type": "linear", "factor": 4}, "linear", 8192),
        ({"type": "dynamic", "factor": 2.0}, "dynamic", 4096),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, "yarn", 8192),
        ({"type": "default"}, "default", 2048),
        (None, "default", 2048),
    ],
)
def test_scaled_ropes_reach_further(tmp_path: Path, rope: Any, kind: str, reach: int) -> None:
    spec = read_spec(write(tmp_path, {"architectures": ["LlamaForCausalLM"], "rope_scaling": rope}))
    assert (spec.rope.kind, spec.max_position) == (kind, reach)


def test_eos_ids_are_the_union_of_both_files(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen2ForCausalLM"], "eos_token_id": 7}
    assert read_spec(write(tmp_path, config, {"eos_token_id": [9, 7]})).eos_token_ids == (7, 9)
    assert read_spec(write(tmp_path, config | {"eos_token_id": None}, {})).eos_token_ids == ()


def test_qwen_sliding_windows_follow_max_window_layers_or_layer_types(tmp_path: Path) -> None:
    base = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 4, "sliding_window": 9}
    assert read_spec(write(tmp_path, base)).sliding_window is None
    on = base | {"use_sliding_window": True}
    assert read_spec(write(tmp_path, on)).sliding_window is None  # max_window_layers is 28
    spec = read_spec(write(tmp_path, on | {"max_window_layers": 3}))
    assert (spec.sliding_window, spec.full_layers) == (9, (0, 1, 2))
    types = ["full_attention", "sliding_attention"] * 2
    assert read_spec(write(tmp_path, on | {"layer_types": types})).full_layers == (0, 2)


def test_qwen1_names_are_read(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path, {  # Qwen-14B-Chat's config.json
        "architectures": ["QWenLMHeadModel"], "hidden_size": 5120, "intermediate_size": 27392,
        "kv_channels": 128, "layer_norm_epsilon": 1e-06, "max_position_embeddings": 8192, "no_bias": True,
        "num_attention_heads": 40, "num_hidden_layers": 40, "rotary_emb_base": 10000, "rotary_pct": 1.0,
        "seq_length": 2048, "tie_word_embeddings": False, "use_dynamic_ntk": True, "use_logn_attn": True,
        "vocab_size": 152064, "bf16": True,
    }))  # fmt: skip
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (40, 40, 40, 128)
    assert (spec.intermediate_size, spec.train_length, spec.max_position) == (13696, 2048, 8192)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.logn_attn) == (True, False, False, True)
    assert (spec.rope.kind, spec.rope.params, spec.dtype) == ("qwen_ntk", {"train_length": 2048}, "bfloat16")


def test_a_spec_survives_the_wire(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path, {
        "architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "max_window_layers": 30,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    }, {"eos_token_id": [1, 2]}))  # fmt: skip
    assert ModelSpec.from_wire(msgpack.unpackb(msgpack.packb(spec.to_wire()))) == spec


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are Llama"),
        ({}, "architecture none is not supported"),
        ("{", "is not JSON"),
        ("[1]", "holds a list, not an object"),
        ({"architectures": ["LlamaForCausalLM"], "hidden_act": "gelu"}, "hidden_act gelu"),
        ({"architectures": ["LlamaForCausalLM"], "quantization_config": {"bits": 4}}, "quantised"),
        ({"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "longrope"}}, "rope type longrope"),
        ({"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 5}, "no multiple of 5"),
        ({"architectures": ["LlamaForCausalLM"], "hidden_size": "big"}, "wrong type"),
        ({"architectures": ["LlamaForCausalLM"], "torch_dtype": "int8"}, "dtype int8"),
    ],
)  # fmt: skip
def test_bad_configs_are_refused_in_one_line(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_spec(write(tmp_path, config))
    assert "\n" not in str(caught.value)


def test_missing_folders_and_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        read_spec(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        read_spec(tmp_path)


def test_code_in_the_folder_never_runs_and_torch_is_not_imported(tmp_path: Path) -> None:
    write(tmp_path, {
        "architectures": ["QWenLMHeadModel"], "seq_length": 2048,
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    })  # fmt: skip
    (tmp_path / "configuration_qwen.py").write_text("open('ran', 'w')\n")
    code = (
        "import sys; from engine.models.registry import read_spec; read_spec('.'); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
    assert not (tmp_path / "ran").exists()


def test_prompts_of_different_rotation_never_share_prefix_blocks(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path, {"architectures": ["QWenLMHeadModel"], "seq_length": 100}))
    salts = [prefix_salt(spec, n) for n in (1, 100, 101, 200, 201, 400, 401)]
    assert salts[0] == salts[1]
    assert salts[1] != salts[2] == salts[3] != salts[4] == salts[5] != salts[6]
    assert len(set(salts)) == 4
    assert {len(salt) for salt in salts} == {4}, "appended to a tenant's salt, no two may meet"
    plain = read_spec(write(tmp_path, {"architectures": ["LlamaForCausalLM"]}))
    assert prefix_salt(plain, 10**6) == b""
    dynamic = read_spec(write(tmp_path, {
        "architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }))  # fmt: skip
    assert len({prefix_salt(dynamic, n) for n in (1, 2048, 2049, 2050)}) == 3
