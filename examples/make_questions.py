"""Writes questions.jsonl (OpenAI batch lines) and answers.jsonl: 200 held-out questions, seeded.

python examples/make_questions.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import demo_tasks

#: Questions of each task; sums and products get the two that are left of 200.
COUNTS = {"sum": 34, "product": 34, "sort": 33, "reverse": 33, "compare": 33, "copy": 33}


def main() -> None:
    rng = random.Random(2026)
    questions, answers = [], []
    for task, count in COUNTS.items():
        seen: set[str] = set()
        while len(seen) < count:
            question, answer = demo_tasks.generate_split(task, rng, held_out=True)
            if question in seen:
                continue
            seen.add(question)
            custom_id = f"{task}-{len(seen):03}"
            body = {
                "model": "demo", "messages": [{"role": "user", "content": question}],
                "max_tokens": 32, "temperature": 0,
            }  # fmt: skip
            line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
            questions.append(json.dumps(line))
            answers.append(json.dumps({"custom_id": custom_id, "task": task, "answer": answer}))
    folder = Path(__file__).parent
    (folder / "questions.jsonl").write_text("\n".join(questions) + "\n")
    (folder / "answers.jsonl").write_text("\n".join(answers) + "\n")


if __name__ == "__main__":
    main()
