"""What several commands share: the engine's flags, the queue's flags, and names made from paths.

The flags of the engine are the fields of `engine.config.EngineConfig` under vLLM's names. A flag that
is not given is not passed on, so that defaults live in one place.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.errors import HeadraceError

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from headrace.settings import Settings

#: Exit codes. Usage errors are 1 as well, because 2 means that rows failed.
OK, CANNOT, ROWS_FAILED, INTERRUPTED = 0, 1, 2, 130


class CommandError(HeadraceError):
    """A command cannot be done as it was given."""


#: (field of EngineConfig, type, metavar, help); booleans have type bool.
_ENGINE_FLAGS: tuple[tuple[str, Any, str, str], ...] = (
    ("tensor_parallel_size", int, "N", "ranks that share every layer"),
    (
        "executor",
        str,
        "NAME",
        "inproc (one rank, no Ray) or ray (default: inproc for one rank)",
    ),
    ("dtype", str, "NAME", "auto (the checkpoint's own), float32, bfloat16 or float16"),
    ("max_model_len", int, "N", "tokens that prompt and output may have together (default: the model's)"),
    ("max_num_seqs", int, "N", "rows that run at once"),
    ("max_num_batched_tokens", int, "N", "token budget of one step"),
    ("lookahead", int, "N", "waiting jobs whose order is planned; 0 is first come, first served"),
    ("block_size", int, "N", "tokens in a KV block"),
    ("gpu_memory_utilization", float, "SHARE", "share of each GPU's memory that the engine may use"),
    ("kv_cache_memory", float, "GIB", "KV cache of each rank on CPUs (default: what the machine can spare)"),
    ("enable_prefix_caching", bool, "", "keep KV blocks of finished rows for rows that begin alike"),
    ("seed", int, "N", "engine seed; a job's own seed goes first"),
    ("served_model_name", str, "NAME", "model name in completions (default: the folder's name)"),
    ("max_parallel_loading_workers", int, "N", "ranks that load weights at once (default: all)"),
    ("ray_address", str, "ADDRESS", "join this Ray cluster (default: start a local one)"),
    ("num_threads", int, "N", "CPU threads of each rank (default: cores / ranks)"),
    ("quantization", str, "NAME", "int8: products in 8 bits, on CPUs; faster, other answers"),
    ("enforce_eager", bool, "", "launch every kernel of a GPU's steps by itself, without CUDA graphs"),
    ("device", str, "NAME", "auto, cpu or cuda"),
)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of EngineConfig but `--model`, absent from the namespace unless given."""
    from engine.config import EngineConfig

    defaults = {f.name: f.default for f in dataclasses.fields(EngineConfig)}
    group = parser.add_argument_group("engine")
    for name, kind, metavar, text in _ENGINE_FLAGS:
        flag = "--" + name.replace("_", "-")
        if "(default:" not in text and not (kind is str and "auto" in text):
            text += f" (default: {defaults[name]})"
        if kind is bool:
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            group.add_argument(flag, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)


def given_engine_flags(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name, *_ in _ENGINE_FLAGS if hasattr(args, name)}


def engine_config(model: str, given: dict[str, Any]) -> EngineConfig:
    """The checked configuration. More than one rank means Ray unless told otherwise."""
    from engine.config import EngineConfig

    many = given.get("tensor_parallel_size", 1) > 1
    return EngineConfig(model=model, **({"executor": "ray" if many else "inproc"} | given))


def check_model(config: EngineConfig) -> None:
    """What can be refused without loading: no folder, unknown architecture, heads that do not divide.

    Raises ConfigError or CheckpointError.
    """
    from engine.config import check_parallel, context_length
    from engine.models.registry import read_spec

    spec = read_spec(config.model)
    check_parallel(spec, config)
    context_length(spec, config)


def engine_argv(model: str, given: dict[str, Any]) -> list[str]:
    """The same settings as command-line words, for a child process."""
    words = ["--model", model]
    for name, value in given.items():
        flag = name.replace("_", "-")
        words += (
            [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        )
    return words


def add_queue_flags(parser: argparse.ArgumentParser) -> None:
    """Where the queue is, for the long-lived commands."""
    group = parser.add_argument_group("queue")
    group.add_argument("--redis", metavar="URL", default=None, help="redis://, rediss:// or unix:// URL")
    group.add_argument(
        "--lane", metavar="NAME", default=None, help="lane: one served model (default: default)"
    )
    group.add_argument(
        "--allow-volatile", action="store_true", default=None, help="take a server without append-only file"
    )


def settings(args: argparse.Namespace) -> Settings:
    """Defaults, settings file, environment and the queue's flags."""
    from headrace.settings import Settings

    names = ("redis", "lane", "allow_volatile", "drain_s")
    return Settings.load({name: getattr(args, name, None) for name in names})


def log_to_stderr() -> None:
    """One line an event, for processes that run long and that operators read."""
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")


def name_from(path: str) -> str:
    """A run or group name made from a file's path: readable, stable for the path, safe in keys."""
    resolved = str(Path(path).resolve())
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).stem).strip("-._")[:40] or "run"
    return f"{stem}-{hashlib.blake2b(resolved.encode('utf-8', 'surrogateescape'), digest_size=4).hexdigest()}"
