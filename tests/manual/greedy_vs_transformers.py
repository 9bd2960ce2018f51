"""Greedy text of the engine against transformers', in fp32, on 20 prompts of a real checkpoint.

python tests/manual/greedy_vs_transformers.py MODEL_DIR [--tokens 24]
"""

from __future__ import annotations

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.config import EngineConfig
from engine.engine import Engine
from engine.exec.inproc import InprocExecutor
from engine.models.registry import read_spec
from engine.request import Request, Sampling

PROMPTS = (
    "The capital of France is", "def fibonacci(n):\n", "Water boils at", "The three primary colours are",
    "import numpy as np\n\ndef mean(", "Once upon a time", "1, 1, 2, 3, 5, 8,",
    "SELECT name FROM users WHERE",
    "The opposite of hot is", "A haiku about the sea:\n", "In 1969,", "for i in range(10):\n    ",
    "The largest planet is", "class Stack:\n    def push(self, x):", "Q: What is 7 times 8?\nA:",
    "Dear Sir or Madam,", "const add = (a, b) =>", "The chemical symbol for gold is",
    "To be, or not to be,", "# Sort a list in Python\n",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    wanted = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = reference.generate(**ids, max_new_tokens=args.tokens, do_sample=False)
        wanted.append(out[0][ids["input_ids"].shape[1] :].tolist())
    del reference
    spec = read_spec(args.model)
    config = EngineConfig(model=args.model, dtype="float32", max_model_len=512)
    engine = Engine(config, spec, InprocExecutor(config, spec))
    engine.start()
    stops = (*spec.eos_token_ids, tokenizer.eos_token_id)
    requests = [
        Request(
            str(i),
            tokenizer(prompt)["input_ids"],
            Sampling(max_tokens=args.tokens, temperature=0.0, stop_token_ids=stops),
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    for request in requests:
        engine.add(request)
    engine.drain()
    engine.stop()
    different = [p for p, r, w in zip(PROMPTS, requests, wanted, strict=True) if r.output != w]
    print(json.dumps({"model": args.model, "prompts": len(PROMPTS), "equal": len(PROMPTS) - len(different),
                      "different": different}))  # fmt: skip


if __name__ == "__main__":
    main()
