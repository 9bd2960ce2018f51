"""Reads one rank's tensors from a folder of safetensors, strictly: every name must be accounted for.

Knows nothing of models: the shard plan (`engine.load.shards`) says what to read. Only the slices that
this rank owns are touched, so a checkpoint may be larger than the memory of one machine. Pickle files
are refused, since reading one can run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import CheckpointError
from engine.load.shards import Shard

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: Tensors that old checkpoints carry although they follow from config.json.
DERIVED = ("rotary_emb.inv_freq",)


class Checkpoint:
    """The tensors of a model folder by name; a context manager that keeps its files mapped."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file_of = _tensor_files(self.folder)
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.clear()

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        """`name[start : start + length]` along dimension 0 or 1, in the checkpoint's dtype."""
        view = self._slice(name)
        return view[start : start + length] if dim == 0 else view[:, start : start + length]

    def _slice(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = _open(self.folder / file)
        try:
            return self._open[file].get_slice(name)
        except SafetensorError as e:
            raise CheckpointError(
                f"{self.folder / INDEX} says that {name} is in {file}, but it is not: {e}"
            ) from e


def load_shards(
    checkpoint: Checkpoint, shards: Iterable[Shard], dtype: torch.dtype, tied_head: str | None = None
) -> dict[str, torch.Tensor]:
    """Read all shards as CPU tensors by target name; those with an empty shape are left out.

    `tied_head` names a head that is an alias of the embedding: a checkpoint may carry it or not.
    Raises CheckpointError that names the missing, the unexpected or the wrongly shaped tensors.
    """
    shards = list(shards)
    _check(checkpoint, shards, tied_head)
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        if 0 in shard.shape:
            continue
        tensor = torch.zeros(shard.shape, dtype=dtype)
        for p in shard.pieces:
            if p.length:
                tensor.narrow(p.dim, p.at, p.length).copy_(
                    checkpoint.read(p.source, p.dim, p.start, p.length)
                )
        tensors[shard.target] = tensor
    return tensors


def dummy_shards(
    shards: Iterable[Shard], dtype: torch.dtype, seed: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Random tensors of the model's shape (std 0.02, norms 1), for benchmarks without a checkpoint; drawn on
    the device, as a CPU needs a minute for 8 billion."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        if 0 in shard.shape:
            continue
        if shard.target.endswith("norm.weight"):
            tensors[shard.target] = torch.ones(shard.shape, dtype=dtype, device=device)
        else:
            tensors[shard.target] = torch.empty(shard.shape, dtype=dtype, device=device).normal_(
                0.0, 0.02, generator=generator
            )
    return tensors


def _check(checkpoint: Checkpoint, shards: list[Shard], tied_head: str | None) -> None:
    wanted = {p.source: p.source_shape for shard in shards for p in shard.pieces}
    missing = sorted(wanted.keys() - checkpoint.names)
    if missing:
        raise CheckpointError(f"{checkpoint.folder} lacks {_some(missing)}, which the model needs.")
    unexpected = sorted(
        name for name in checkpoint.names - wanted.keys() if not name.endswith(DERIVED) and name != tied_head
    )
    if unexpected:
        raise CheckpointError(
            f"{checkpoint.folder} has {_some(unexpected)}, which its architecture does not know: "
            "the config.json belongs to another checkpoint, or the model is a variant that is not supported."
        )
    wrong = [
        f"{name} has shape {list(found)}, the model needs {list(shape)}"
        for name, shape in sorted(wanted.items())
        if (found := checkpoint.shape(name)) != shape
    ]
    if wrong:
        raise CheckpointError(f"{checkpoint.folder} does not fit its config.json: {_some(wrong, 'tensors')}.")


def _some(items: list[str], what: str = "tensors") -> str:
    shown = "; ".join(items[:5]) if what == "tensors" and " " in items[0] else ", ".join(items[:5])
    return shown if len(items) <= 5 else f"{shown} and {len(items) - 5} more {what}"


def _tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or from the one file."""
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{folder / INDEX} is not a safetensors index: {e!r}") from e
        absent = sorted({file for file in files.values() if not (folder / file).is_file()})
        if absent:
            raise CheckpointError(
                f"{folder} lacks {', '.join(absent)}, which {INDEX} names: copy the rest of the checkpoint."
            )
        return files
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_open(folder / SINGLE).keys(), SINGLE)
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds weights only as pickle ({pickles[0]}), and reading pickle can run code: "
            f"convert the checkpoint to safetensors."
        )
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}.")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} cannot be read as safetensors (cut off or damaged?): {e}") from e
