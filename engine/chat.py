"""Chat templates: Jinja text from a model folder, rendered as `transformers` renders it, in a sandbox.

A template is data from a stranger: it runs in Jinja's immutable sandbox without a loader, sees only the
messages and the names of the special tokens, and is bounded in loop passes, products and output
(CVE-2024-34359 and its kin). That keeps it from the machine and from endless loops; one that was written
to fill the memory by joining strings is not stopped. A template's failure is the job's, not the engine's.

Also here: how text that users wrote is kept from turning into special tokens (`mark`, `split_marked`).
Knows nothing of token ids; the tokenizers call it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context, Namespace
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from engine.errors import InvalidRequest

#: One turn: `role`, `content`, and `name` where it was given.
Turn = dict[str, str]

#: Largest template source, in characters; the longest published ones have about 30,000.
MAX_SOURCE = 1 << 20
#: Loop passes of one rendering: 4,096 messages with two hundred passes each.
MAX_PASSES = 1 << 20
#: Largest rendered prompt, in characters; jobs are at most 1 MiB.
MAX_OUTPUT = 16 << 20
#: Largest string or list that a template may build by multiplication.
MAX_PRODUCT = 1 << 20
#: Largest power of whole numbers, in bits.
MAX_POWER_BITS = 4096

#: Noncharacters (Unicode 23.7, for internal use) that enclose a special token's name in user text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]")
_BUDGET = "_passes_left"


class ChatTemplate:
    """One compiled template. `special_tokens` are its variables: `bos_token`, `eos_token` and so on."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._fault = ""
        self._template: jinja2.Template | None = None
        try:
            if len(source) > MAX_SOURCE:
                raise SecurityError(f"its {len(source)} characters exceed the limit of {MAX_SOURCE}")
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as e:
            self._fault = str(e)

    @property
    def fault(self) -> str:
        """Why the template cannot be compiled; "" when it can."""
        return self._fault

    def render(self, messages: list[Turn]) -> str:
        """The prompt that asks for the next assistant turn.

        Raises InvalidRequest("chat_template_failed") whatever goes wrong in the template.
        """
        if self._template is None:
            raise _failed(self._fault)
        budget = iter(range(MAX_PASSES))
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                self._special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **{_BUDGET: budget},
            ):
                size += len(part)
                if size > MAX_OUTPUT:
                    raise SecurityError(f"it writes more than {MAX_OUTPUT} characters")
                parts.append(part)
        except Exception as e:  # a template is a program: its faults are of every kind
            raise _failed(str(e) or type(e).__name__) from e
        return "".join(parts)


def mark(messages: list[Turn], special: re.Pattern[str] | None) -> list[Turn] | None:
    """Messages with every special token's name in user text enclosed in marks; None: there is none.

    The idea is that of transformers' `sanitize_control_tokens`: marks survive whatever the template
    does with the text, and text without special names is rendered and tokenised as ever.
    """
    if special is None or not any(special.search(v) for m in messages for k, v in m.items() if k != "role"):
        return None
    return [
        {k: v if k == "role" else special.sub(rf"{_OPEN}\g<0>{_CLOSE}", v) for k, v in m.items()}
        for m in messages
    ]


def split_marked(rendered: str) -> Iterator[tuple[str, bool]]:
    """Pieces of a rendered prompt in order: (text, False) as it is, (name, True) to be spelled as plain text.

    A mark that lost its partner (the template split the text there, or a user wrote one) still parts the
    text around it, so that the two sides cannot grow together to a special token.
    """
    at = 0
    for m in _MARKS.finditer(rendered):
        if m.start() > at:
            yield rendered[at : m.start()], False
        if m.group(1):
            yield m.group(1), True
        at = m.end()
    if at < len(rendered):
        yield rendered[at:], False


def special_pattern(names: Iterable[str]) -> re.Pattern[str] | None:
    """Finds any special token's name, longest first."""
    ordered = sorted((n for n in names if n), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _failed(why: str) -> InvalidRequest:
    return InvalidRequest("chat_template_failed", f"the model's chat template failed: {why[:500]}")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with every loop counted and products bounded."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and left.bit_length() * right > MAX_POWER_BITS:
            raise SecurityError(f"a power of {left.bit_length() * right} bits exceeds {MAX_POWER_BITS}")
        for many, times in ((left, right), (right, left)):
            many_items = isinstance(many, (str, list, tuple)) and isinstance(times, int)
            if operator == "*" and many_items and len(many) * times > MAX_PRODUCT:
                raise SecurityError(f"a product of {len(many) * times} items exceeds {MAX_PRODUCT}")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _BUDGET, [], [], None, None, lineno=loop.lineno)
        return tree


class _GenerationTag(Extension):
    """`{% generation %}` marks assistant text for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _SafeNamespace(Namespace):
    """`namespace()` that refuses underscored names, as transformers does."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        Namespace.__init__(self, *args, **kwargs)
        for name in dict(*args, **kwargs):
            _refuse_private(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names must not begin with an underscore")


def _environment() -> _Sandbox:
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    for name in ("lipsum", "cycler", "joiner"):
        del env.globals[name]
    env.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _dict,
        "namespace": _SafeNamespace,
    }
    env.filters |= {"tojson": _tojson, _BUDGET: _counted}
    return env


@jinja2.pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    budget = context.parent[_BUDGET]
    for item in items:
        if next(budget, None) is None:
            raise SecurityError(f"its loops exceed {MAX_PASSES} passes")
        yield item


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # local time, as transformers


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
