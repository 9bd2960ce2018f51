"""One settings object: defaults, then a TOML file, then HEADRACE_* variables, then flags.

The file is `headrace.toml` in the current folder, or what HEADRACE_CONFIG names. Unknown names are refused
in both, so that a misspelt setting is found. Knows nothing of what the settings are for.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import SettingsError

PREFIX = "HEADRACE_"
#: HEADRACE_ variables that are no settings.
_OTHERS = {"HEADRACE_CONFIG", "HEADRACE_PARENT_PID"}


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the queue is and how it is kept. Seconds are seconds."""

    redis: str = "redis://127.0.0.1:6379/0"
    lane: str = "default"
    allow_volatile: bool = False  # take a server without an append-only file
    lease_s: float = 30.0  # a job comes back this long after its engine was last heard of
    drain_s: float = 20.0  # on SIGTERM: what runs gets this long to finish
    max_attempts: int = 5  # tries of a job that fails by a fault of the engine's own
    lane_bound: int = 10_000  # jobs waiting or leased; producers wait above it
    result_bound: int = 10_000  # completions in one result stream; engines pause intake above it
    spool: str = ""  # folder for completions while the server is away (default: in the user's state folder)
    spool_mb: int = 256  # what one engine may keep there
    retention_days: float = 7.0  # marks and counters of a run outlive its last change by this

    def __post_init__(self) -> None:
        for name in ("lease_s", "max_attempts", "lane_bound", "result_bound", "spool_mb", "retention_days"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} {getattr(self, name)} must be above 0")
        if self.drain_s < 0:
            raise SettingsError(f"drain_s {self.drain_s} must not be negative")

    @classmethod
    def load(
        cls, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
    ) -> Settings:
        """All sources, the later ones first in rank; flags that are None count as not given.

        Raises SettingsError.
        """
        environ = os.environ if environ is None else environ
        values = _from_file(environ.get("HEADRACE_CONFIG"))
        values |= _from_environ(environ)
        values |= {k: v for k, v in (flags or {}).items() if v is not None}
        return cls(**{k: _as_field(k, v) for k, v in values.items()})


_FIELDS = {f.name: f for f in dataclasses.fields(Settings)}


def _from_file(named: str | None) -> dict[str, Any]:
    path = Path(named or "headrace.toml")
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if named:
            raise SettingsError(f"settings file {path} (HEADRACE_CONFIG) does not exist") from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise SettingsError(f"settings file {path} cannot be read: {e}") from None
    for name in values:
        if name not in _FIELDS:
            raise SettingsError(f"settings file {path}: unknown setting {name}; known: {', '.join(_FIELDS)}")
    return values


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for variable, value in environ.items():
        if variable.startswith(PREFIX) and variable not in _OTHERS:
            name = variable.removeprefix(PREFIX).lower()
            if name not in _FIELDS:
                raise SettingsError(
                    f"unknown variable {variable}; known: {PREFIX}{', '.join(_FIELDS).upper()}"
                )
            values[name] = value
    return values


def _as_field(name: str, value: Any) -> Any:
    """The value in its field's type; text from the environment is read as that type."""
    if name not in _FIELDS:
        raise SettingsError(f"unknown setting {name}; known: {', '.join(_FIELDS)}")
    kind: type[Any] = type(_FIELDS[name].default)
    try:
        if kind is bool and isinstance(value, str):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[
                value.lower()
            ]
        if kind is not bool and isinstance(value, bool):
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, KeyError):
        raise SettingsError(f"setting {name}: {value!r} is not a {kind.__name__}") from None
