"""Small real tokenizers, written to a folder as model folders have them. Knows nothing of the engine.

Four kinds: byte-level BPE (as Qwen, Llama 3), sentencepiece-like BPE with byte fallback (as Llama 2,
Mistral), word level without a decoder, and Qwen-1's qwen.tiktoken.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.config import ModelSpec, RopeSpec

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is 12 + 30? It is 42.\n\n",
    "Größe, naïve café, 你好世界, こんにちは, emoji 😀🎉👍🏽 and more.\nUser: hello Assistant: hi there!",
    "def reverse(words):\n    return ' '.join(reversed(words))\n    # indented    text\n" * 3,
    "system user assistant You are a helpful assistant.\n" * 3,
]
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user and assistant') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}{%- if loop.first and system_message is defined %}"
    "{{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}{%- else %}"
    "{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)


def spec(vocab_size: int, **changes: Any) -> ModelSpec:
    """A model shape; only the vocabulary and the EOS ids matter here."""
    values: dict[str, Any] = {
        "architecture": "Qwen3ForCausalLM", "vocab_size": vocab_size, "hidden_size": 8,
        "intermediate_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8,
        "max_position": 512, "rms_eps": 1e-6, "rope": RopeSpec(),
    }  # fmt: skip
    return ModelSpec(**(values | changes))


def byte_level(
    folder: Path,
    template: str | None = CHATML,
    *,
    nfc: bool = True,
    corpus: list[str] = CORPUS,
    **config: Any,
) -> Path:
    """About 450 tokens, all 256 bytes among them; `<think>` and two more are added but not special."""
    t = Tokenizer(models.BPE())
    if nfc:
        t.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    t.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    t.add_tokens(["<think>", "</think>", "<a tool>", "é–"])
    return write(folder, t, template, eos_token="<|im_end|>", pad_token="<|endoftext|>", **config)


def sentencepiece(folder: Path, template: str | None = MISTRAL, **config: Any) -> Path:
    """BPE on "▁" words with byte fallback and BOS: the shape of Llama 2's and Mistral's tokenizer.json."""
    words = [text.replace(" ", "▁") for text in CORPUS]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [p for p in model["vocab"] if p != "<unk>"]
    merges = [tuple(m) for m in model["merges"]]
    vocab = {p: i for i, p in enumerate(pieces)}
    t = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    return write(folder, t, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **config)


def word_level(folder: Path, size: int = 100) -> Path:
    """'t17' is token 17; no decoder, no template."""
    t = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return write(folder, t, None, unk_token="t0", eos_token="t2", pad_token="t1")


def qwen_tiktoken(folder: Path) -> Path:
    """256 bytes and a few merges, as in the published file; the special tokens follow at 256 + merges."""
    merges = [b"th", b"the", b" the", b"  ", b"us", b"user", b"er", b"ass", b"is", b"\n\n", "你".encode()[:2]]
    tokens = [bytes([b]) for b in range(256)] + merges
    lines = [f"{base64.b64encode(t).decode()} {i}" for i, t in enumerate(tokens)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    return folder


def write(folder: Path, t: Tokenizer, template: str | None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
    if template is not None:
        values["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder
