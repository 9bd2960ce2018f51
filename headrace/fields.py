"""What fields of messages are made of: names, text, numbers, and the words that both sides use.

Strict: a number is no string, text is valid Unicode. Knows no message; `headrace.messages` is built of it.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

#: Version of the job and completion envelopes.
VERSION = 1
#: Job ids, run names, lane names and result stream names: safe in keys, file names and logs.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$"


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(
            f"text holds a lone surrogate at character {e.start}, which is not valid Unicode"
        ) from None
    return text


def _given(text: str) -> str:
    if not text:
        raise ValueError("text is empty")
    return text


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return value


Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Text = Annotated[StrictStr, AfterValidator(_encodable)]
GivenText = Annotated[Text, AfterValidator(_given)]
Number = Annotated[float, Field(strict=True), AfterValidator(_finite)]  # ints pass, strings and bools do not
TokenId = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]


class Kind(StrEnum):
    """What a job asks for."""

    CHAT = "chat"
    COMPLETION = "completion"
    SCORE = "score"


class Priority(StrEnum):
    """Streams of one lane, most urgent first."""

    INTERACTIVE = "interactive"
    NORMAL = "normal"
    BULK = "bulk"


class Status(StrEnum):
    """How a job ended."""

    OK = "ok"
    ERROR = "error"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    DEAD = "dead"


class Strict(BaseModel):
    """A message: unknown fields are errors, and it never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def readable(e: ValidationError) -> str:
    """The first problems of a pydantic error as one line: `params.n: Input should be ... (got 0)`."""
    lines = []
    for err in e.errors(include_url=False)[:3]:
        where = ".".join(str(p) for p in err["loc"] if not str(p).startswith(("constrained-", "function-")))
        got = err.get("input")
        hidden = isinstance(got, (dict, list)) or err["type"] == "missing"
        shown = "" if hidden else f" (got {str(got)[:60]!r})"
        message = err["msg"].removeprefix("Value error, ")
        if err["type"] == "extra_forbidden":
            message, shown = "unknown field", ""
        lines.append(f"{where}: {message}{shown}" if where else message)
    return "; ".join(lines).encode("utf-8", "replace").decode()
