"""`tokenizer.json` tokenizers, through the `tokenizers` library and nothing else.

`transformers` is not used to load them: tokenizer.json says all, whereas its classes rebuild parts of it
by the name in tokenizer_config.json. What that file adds (further tokens, named special tokens, the
chat template) is applied here as `transformers` applies it; a test holds the two together.
Implements `engine.tokenizer.Tokenizer`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from engine.chat import ChatTemplate, Turn, mark, special_pattern, split_marked
from engine.errors import ConfigError, InvalidRequest
from engine.tokenizer import read_json, refuse_too_long

log = logging.getLogger(__name__)

#: Named special tokens that chat templates may use.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: Normalizers that make no text more than this much shorter, in bytes of UTF-8. NFC's worst cases are
#: three to one (three jamo of three bytes each become one syllable of three bytes).
_SHRINK = {"NFC": 4, "Prepend": 1}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HFTokenizer:
    """One loaded tokenizer.json with its settings."""

    def __init__(self, backend: Backend, *, named: dict[str, str], template: str | None) -> None:
        """`named`: special tokens by their role, such as "eos_token"."""
        # Rows are tokenised one by one on a side thread: more threads would take the model's cores.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        self._special = special
        self.special_ids = frozenset(special.values())
        self._special_pattern = special_pattern(special)
        self.bos_token_id = backend.token_to_id(named["bos_token"]) if "bos_token" in named else None
        eos = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self._to_bytes, self.lead = _piece_rule(backend)
        self._piece_cache: dict[int, bytes] = {}
        stripping = any(token.lstrip or token.rstrip for token in added.values())
        self._longest = 0 if stripping else _longest_text_of_a_token(backend, vocab, self._to_bytes)
        self._template = ChatTemplate(template, named) if template is not None else None
        if self._template and self._template.fault:
            log.warning("chat template cannot be compiled, chat jobs will fail: %s", self._template.fault)

    @classmethod
    def load(cls, folder: str) -> HFTokenizer:
        """From tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

        Raises ConfigError.
        """
        path = os.path.join(folder, "tokenizer.json")
        try:
            backend = Backend.from_file(path)
        except Exception as e:  # the library raises plain Exception for every fault of the file
            raise ConfigError(f"{path} cannot be read: {e}") from e
        config = read_json(folder, "tokenizer_config.json")
        names = read_json(folder, "special_tokens_map.json") | config
        named = {k: _content(names[k]) for k in _NAMED if names.get(k) is not None}
        _add_tokens(backend, config, named, folder)
        return cls(backend, named=named, template=_read_template(folder, config))

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self._run(text, add=False) if special else self._spell(text)

    def encode_prompt(self, text: str, *, limit: int | None = None) -> list[int]:
        refuse_too_long(self._fewest_tokens(text), limit)
        # The file's post-processor adds BOS; tokenizer_config.json's add_bos_token counts for nothing
        # beside a tokenizer.json, as in transformers.
        return self._run(text, add=True)

    def encode_chat(self, messages: list[Turn], *, limit: int | None = None) -> list[int]:
        if self._template is None:
            raise InvalidRequest(
                "no_chat_template",
                "the model folder has no chat template: send prompt or prompt_token_ids, or add "
                "chat_template.jinja to the folder",
            )
        marked = mark(messages, self._special_pattern)
        rendered = self._template.render(marked or messages)
        refuse_too_long(self._fewest_tokens(rendered), limit)
        if marked is None:
            return self._run(rendered, add=False)
        ids: list[int] = []
        for i, (text, as_text) in enumerate(split_marked(rendered)):
            ids += self._continue(text, special=not as_text) if i else self.encode(text, special=not as_text)
        return ids

    def token_id(self, text: str) -> int | None:
        return self._special.get(text)

    def piece(self, token_id: int) -> bytes:
        data = self._piece_cache.get(token_id)
        if data is None:
            token = self._backend.id_to_token(token_id)
            data = self._piece_cache[token_id] = b"" if token is None else self._to_bytes(token)
        return data

    def _run(self, text: str, *, add: bool) -> list[int]:
        try:
            # The batch call skips character offsets: 1.8 times as fast as `encode` for a page of text.
            return self._backend.encode_batch_fast([text], add_special_tokens=add)[0].ids
        except TypeError:
            raise InvalidRequest(
                "invalid_text", "the prompt is not valid Unicode: remove its lone surrogates"
            ) from None

    def _spell(self, text: str) -> list[int]:
        """Ids of plain text: the pipeline without its added tokens."""
        ids = self._model_ids(text)
        if self.special_ids.isdisjoint(ids):
            return ids
        # A vocabulary that holds the name as an ordinary word as well: spell it by characters.
        ids = [i for char in text for i in self._model_ids(char)]
        if not self.special_ids.isdisjoint(ids):
            raise InvalidRequest(
                "special_token_in_text", f"{text[:40]!r} cannot be written as plain text: remove it"
            )
        return ids

    def _model_ids(self, text: str) -> list[int]:
        b = self._backend
        if b.normalizer is not None:
            text = b.normalizer.normalize_str(text)
        parts = [p for p, _ in b.pre_tokenizer.pre_tokenize_str(text)] if b.pre_tokenizer else [text]
        return [token.id for part in parts for token in b.model.tokenize(part)]

    def _continue(self, text: str, *, special: bool) -> list[int]:
        """Ids of text in the middle of a prompt: without the space that some tokenizers put first.

        As transformers does it: behind a newline, whose ids are then taken away.
        """
        newline = self.encode("\n", special=special)
        ids = self.encode("\n" + text, special=special)
        if newline and ids[: len(newline)] == newline:
            return ids[len(newline) :]
        return self.encode(text, special=special)

    def _fewest_tokens(self, text: str) -> int:
        return -(-len(text) // self._longest) if self._longest else 0


def _piece_rule(backend: Backend) -> tuple[Callable[[str], bytes], bytes]:
    """How the file's decoder turns one token into bytes, and what a whole text loses in front.

    The decoders are documented in huggingface/tokenizers, `tokenizers/src/decoders`. One difference is
    meant: where a run of byte tokens is not UTF-8, theirs shows the whole run as U+FFFD, and ours only
    the broken bytes, because text that was already shown cannot be taken back.
    """
    if backend.decoder is None:
        return lambda token: b" " + token.encode(), b" "
    spec = json.loads(backend.decoder.__getstate__())
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    replaced: list[tuple[str, str]] = []
    byte_tokens = fused = False
    lead = b""
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and len(steps) == 1:
            return _byte_level, b""
        if kind == "Replace" and "String" in step["pattern"] and not fused:
            replaced.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback":
            byte_tokens = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and (step["start"], step["stop"]) == (1, 0):
            lead = step["content"].encode()
        elif kind == "Metaspace":
            replaced.append((step["replacement"], " "))
            lead = b"" if step.get("prepend_scheme") == "never" else b" "
        else:
            raise ConfigError(
                f"tokenizer.json has an unsupported decoder step {json.dumps(step)[:200]} (supported: "
                "ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip of one leading character)."
            )

    def rule(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        if byte_tokens and (m := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(m[1])
        return token.encode()

    return rule, lead


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte (openai/gpt-2, `encoder.py: bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[c] for c in token])
    except KeyError:
        return token.encode()  # an added token, which is written as it is


def _longest_text_of_a_token(
    backend: Backend, vocab: dict[str, int], to_bytes: Callable[[str], bytes]
) -> int:
    """The most characters of text that one token can stand for; 0 when there is no such bound.

    There is one when every byte has a token of its own, so that no unknown-token can swallow text.
    """
    if not isinstance(backend.model, BPE) or not (backend.model.byte_fallback or to_bytes is _byte_level):
        return 0
    lengths = {data: len(data) for data in map(to_bytes, vocab)}
    if any(bytes([b]) not in lengths for b in range(256)):
        return 0
    shrink = 1
    if backend.normalizer is not None:
        spec = json.loads(backend.normalizer.__getstate__())
        for step in spec["normalizers"] if spec["type"] == "Sequence" else [spec]:
            same_length = step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 1
            shrink *= 1 if same_length and len(step["content"]) == 1 else _SHRINK.get(step["type"], 0)
    return max(lengths.values()) * shrink


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _add_tokens(backend: Backend, config: dict[str, Any], named: dict[str, str], folder: str) -> None:
    """Tokens that tokenizer_config.json knows and tokenizer.json does not."""
    fields = ("single_word", "lstrip", "rstrip", "normalized", "special")
    listed = {int(i): raw for i, raw in (config.get("added_tokens_decoder") or {}).items()}
    # In one call: each call rebuilds the search tree, and there may be thousands of tokens.
    backend.add_tokens(
        [
            AddedToken(raw["content"], **{k: raw[k] for k in fields if k in raw})
            for _, raw in sorted(listed.items())
        ]
    )
    for i, raw in listed.items():
        if backend.token_to_id(raw["content"]) != i:
            raise ConfigError(
                f"{folder}: token {raw['content']!r} has id {i} in tokenizer_config.json but "
                f"{backend.token_to_id(raw['content'])} in tokenizer.json."
            )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [s for s in named.values() if s not in known and backend.token_to_id(s) is not None]
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in missing])


def _read_template(folder: str, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's text or list of named texts ("default")."""
    path = os.path.join(folder, "chat_template.jinja")
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from e
    value = config.get("chat_template")
    if isinstance(value, list):
        value = {t["name"]: t["template"] for t in value}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None
