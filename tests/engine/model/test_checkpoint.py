"""A checkpoint that does not fit its model is refused by the tensor's name, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.load.checkpoint import Checkpoint, load_shards
from engine.load.shards import Cut
from engine.models.decoder import HEAD
from engine.models.registry import read_spec, shards_of
from tests.engine.model import drive, tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.build(tmp_path, "qwen3")
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def load(folder: Path, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    spec = read_spec(folder)
    with Checkpoint(folder) as checkpoint:
        tied = HEAD if spec.tie_embeddings else None
        return load_shards(checkpoint, shards_of(spec, Cut(rank, world)), torch.float32, tied)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight, which"):
        load(folder)


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if ".mlp." in name or "_proj" in name])
    with pytest.raises(CheckpointError, match="and 9 more tensors"):
        load(folder)


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}))
    with pytest.raises(CheckpointError, match=r"has model\.layers\.0\.self_attn\.q_proj\.bias, which"):
        load(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.zeros(63)}))
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight has shape \[63\], the model needs \[64\]"
    ):
        load(folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_sees_the_same_fault(folder: Path, rank: int) -> None:
    """A fault in a part that only one rank reads would leave the others waiting for it."""
    tiny.build(folder, "llama")
    rewrite(folder, lambda t: t.update({"model.layers.1.self_attn.o_proj.bias": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"o_proj\.bias has shape \[3\]"):
        load(folder, rank, 2)


def test_derived_tensors_and_a_tied_head_are_tolerated(folder: Path) -> None:
    without = load(folder)
    rewrite(folder, lambda t: t.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(12),
        "lm_head.weight": t["model.embed_tokens.weight"].clone(),
    }))  # fmt: skip
    assert load(folder).keys() == without.keys()


def test_an_untied_model_needs_its_head(folder: Path) -> None:
    tiny.build(folder, "mistral")
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        load(folder)


def test_a_sharded_checkpoint_reads_like_a_single_file(folder: Path, tmp_path: Path) -> None:
    single = load(folder)
    model = tiny.build(folder, "qwen3")
    many = tmp_path / "many"
    model.save_pretrained(many, max_shard_size="60KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    sharded = load(many)
    assert sharded.keys() == single.keys()
    assert all(torch.equal(sharded[name], single[name]) for name in single)

    next(many.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-\d+\.safetensors, which"):
        load(many)


def test_an_index_that_lies_is_refused(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors") | {"lm_head.extra": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"lm_head\.extra"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        load(folder)


def test_a_cut_off_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        load(folder)


def test_pickle_is_refused_and_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04c__main__\nboom\n")
    with pytest.raises(CheckpointError, match=r"only as pickle \(pytorch_model\.bin\)"):
        load(folder)


def test_an_empty_folder_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load(folder)


def test_each_rank_holds_its_share_only(folder: Path) -> None:
    whole = sum(t.numel() for t in load(folder).values())
    halves = [sum(t.numel() for t in load(folder, rank, 2).values()) for rank in (0, 1)]
    assert max(halves) < 0.52 * whole, f"{halves} of {whole} elements"


def test_dummy_weights_have_the_models_shape(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    worker = drive.worker(folder, load_format="dummy")
    driver = drive.Driver(worker, 64)
    driver.enter(0, tiny.prompt(20))
    assert all(0 <= i < tiny.VOCAB for i in driver.generate(0, 8, 5))
