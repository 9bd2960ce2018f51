"""The functions of the built library, by name and dtype, with their C signatures."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from engine.cpu.build import library

#: Floats of one vector (`vec.h`).
LANES = 16
#: The dtypes that kernels are built for, as their names end.
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_SUFFIX = NAMES | {torch.int8: "i8"}

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_DOUBLE = ctypes.c_double
_ARGUMENTS: dict[str, list[Any]] = {
    "rms_norm": [_POINTER] * 3 + [_INT64] * 4 + [_FLOAT, _INT],
    "rotate": [_POINTER] * 4 + [_INT64] * 5 + [_INT],
    "silu_mul": [_POINTER] * 3 + [_INT64] * 3 + [_INT],
    "heads": [_POINTER] * 10 + [_INT64] * 3 + [_INT] * 5 + [_FLOAT, _INT],
    "add_rms_norm": [_POINTER] * 5 + [_INT64] * 2 + [_FLOAT, _INT],
    "store": [_POINTER] * 5 + [_INT64] * 4 + [_INT] * 4,
    "attend": [_POINTER] * 8 + [_INT64] * 5 + [_INT] * 6 + [_FLOAT, _INT],
    "pack": [_POINTER] * 2 + [_INT64] * 2 + [_INT],
    "linear_i8": [_POINTER] * 8 + [_INT64] * 5 + [_INT] * 4,
    "sum": [_POINTER] * 2 + [_INT64] * 3 + [_INT] * 3 + [_DOUBLE],
    "unpack_rows": [_POINTER] * 3 + [_INT64] * 2,
    "linear": [_POINTER] * 4 + [_INT64] * 5 + [_INT] * 4,
}

#: What those functions return that return something.
_RESULTS = {"sum": _INT}


@functools.cache
def kernel(name: str, dtype: torch.dtype) -> Any:
    """The C function of that name for that dtype; None without a library, or where this CPU lacks it."""
    built, _ = library()
    if built is None or dtype not in _SUFFIX:
        return None
    function = getattr(built, f"headrace_{name}_{_SUFFIX[dtype]}", None)
    if function is not None:
        function.argtypes, function.restype = _ARGUMENTS[name], _RESULTS.get(name)
    return function
