"""Trains the demo model from nothing: tokenizer, weights, chat template; about 25 minutes on two cores.

    python examples/train_demo_model.py            # writes examples/demo_model
    python examples/train_demo_model.py --steps 50 --out /tmp/try

A Qwen3-shaped decoder of 3.3 million parameters learns the six tasks of `demo_tasks.py`. Everything is
seeded, and held-out questions are never drawn. The loss is on answers only. Matrices are trained by Muon
(Jordan et al., 2024), the rest by AdamW: in equal time it got further than AdamW alone.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import demo_tasks
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2  # <|im_end|>
VOCABULARY = 2048
SEED = 20
#: Digits and capitals stand alone, so that they can be added, sorted and reversed one by one.
SPLIT = (
    r"\p{Lu}(?=\p{Lu})| ?\p{Lu}?[\p{Ll}\p{Lt}\p{Lm}\p{Lo}\p{M}]+|\p{Lu}|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: How often each task is drawn; sums and products take longest to learn.
WEIGHTS = {"sum": 3.0, "product": 2.0, "sort": 1.0, "reverse": 1.0, "compare": 1.5, "copy": 1.5}
ROWS, LENGTH = 48, 64  # a batch: rows of packed conversations
RATE, DECAY_SHARE, WARM_UP = 2e-3, 0.5, 100


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE on the tasks' questions and words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    questions = [demo_tasks.generate(task, rng)[0] for task in demo_tasks.TASKS for _ in range(2000)]
    words = [f" {word}" for word in demo_tasks.WORDS for _ in range(20)] + list(demo_tasks.WORDS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*questions, *words, "system\nuser\nassistant\n" * 500], trainer)
    return tokenizer


def turn(question: str) -> str:
    """What stands before an answer; equal to the chat template's output."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def conversations(tokenizer: Tokenizer, rng: random.Random) -> Iterator[tuple[list[int], list[int]]]:
    """Endless (question ids, answer ids) of questions that are not held out."""
    weights = [WEIGHTS[task] for task in demo_tasks.TASKS]
    while True:
        tasks = rng.choices(demo_tasks.TASKS, weights, k=4096)
        pairs = [demo_tasks.generate_split(task, rng, held_out=False) for task in tasks]
        questions = tokenizer.encode_batch([turn(q) for q, _ in pairs])
        answers = tokenizer.encode_batch([f"{a}<|im_end|>" for _, a in pairs])
        yield from ((q.ids, a.ids) for q, a in zip(questions, answers, strict=True))


def batches(
    tokenizer: Tokenizer, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(inputs, targets, whether a target is part of an answer), each [ROWS, LENGTH]."""
    source = conversations(tokenizer, rng)
    newline = tokenizer.encode("\n").ids
    question, answer = next(source)
    while True:
        ids = torch.zeros(ROWS, LENGTH + 1, dtype=torch.long)
        counts = torch.zeros(ROWS, LENGTH + 1, dtype=torch.bool)
        for row in range(ROWS):
            at = 0
            while at + len(question) + len(answer) + len(newline) <= LENGTH + 1:
                if at:
                    ids[row, at] = newline[0]
                    at += 1
                ids[row, at : at + len(question)] = torch.tensor(question)
                at += len(question)
                ids[row, at : at + len(answer)] = torch.tensor(answer)
                counts[row, at : at + len(answer)] = True
                at += len(answer)
                question, answer = next(source)
        yield ids[:, :-1], ids[:, 1:], counts[:, 1:]


def new_model(vocabulary: int) -> Qwen3ForCausalLM:
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        num_hidden_layers=4,
        intermediate_size=640,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        eos_token_id=END,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def train(model: Qwen3ForCausalLM, tokenizer: Tokenizer, steps: int, report: int) -> None:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    optimizers = [
        torch.optim.Muon(matrices, RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    began = time.process_time()
    running = None
    for step, (inputs, targets, counts) in enumerate(batches(tokenizer, random.Random(SEED)), start=1):
        rate = RATE * min(1.0, step / WARM_UP) * min(1.0, (steps - step + 1) / (DECAY_SHARE * steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state[counts]
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), targets[counts])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % report == 0 or step == steps:
            minutes = (time.process_time() - began) / 60 / torch.get_num_threads()
            shares = " ".join(f"{task} {share:.2f}" for task, share in measure(model, tokenizer, 100).items())
            print(f"step {step}/{steps} loss {running:.4f} minutes {minutes:.1f} | {shares}", flush=True)
        if step == steps:
            return


@torch.inference_mode()
def measure(model: Qwen3ForCausalLM, tokenizer: Tokenizer, questions: int) -> dict[str, float]:
    """Share of held-out questions answered exactly, by task, greedily."""
    model.eval()
    rng = random.Random(99)
    shares = {}
    for task in demo_tasks.TASKS:
        asked = [demo_tasks.generate_split(task, rng, held_out=True)[0] for _ in range(questions)]
        prompts = [tokenizer.encode(turn(question)).ids for question in asked]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False,
            eos_token_id=END, pad_token_id=0,
        )  # fmt: skip
        texts = [tokenizer.decode(row[width:].tolist()) for row in out]
        right = sum(demo_tasks.check(task, q, text) for q, text in zip(asked, texts, strict=True))
        shares[task] = right / questions
    model.train()
    return shares


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """bfloat16 safetensors and a tokenizer with its chat template."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[END], pad_token=SPECIAL[0], model_max_length=1024,
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--report", type=int, default=400, help="steps between measurements")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo_model")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began, cpu = time.time(), time.process_time()
    tokenizer = train_tokenizer()
    model = new_model(tokenizer.get_vocab_size())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.get_vocab_size()} tokens")
    train(model, tokenizer, args.steps, args.report)
    save(model, tokenizer, args.out)
    reloaded = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    print(json.dumps({
        "exact": {task: round(share, 3) for task, share in measure(reloaded, tokenizer, 500).items()},
        "wall_minutes": round((time.time() - began) / 60, 1),
        "cpu_minutes_per_thread": round((time.process_time() - cpu) / 60 / args.threads, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
