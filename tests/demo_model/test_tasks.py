"""Promises of the demo's tasks: one right answer, a held-out part that nothing gives away, 200 questions."""

from __future__ import annotations

import json
import random
from pathlib import Path

import demo_tasks
import pytest
from train_demo_model import conversations, train_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


def task_of(question: str) -> str:
    """The one task whose wording the question has."""
    found = []
    for task in demo_tasks.TASKS:
        try:
            demo_tasks.solve(task, question)
        except ValueError:
            continue
        found.append(task)
    assert len(found) == 1, f"{question!r} reads as {found}"
    return found[0]


@pytest.mark.parametrize(
    ("task", "question", "answer"),
    [
        ("sum", "What is 47 + 586?", "633"),
        ("product", "Multiply 7 by 34.", "238"),
        ("sort", "Sort the digits 30530.", "00335"),
        ("reverse", "Spell PLANET backwards.", "TENALP"),
        ("compare", "Which is larger, 999 or 1000?", "1000"),
        ("compare", "Which is smaller, 999 or 1000?", "999"),
        ("copy", "Repeat: river of K9", "river of K9"),
    ],
)
def test_only_the_right_answer_passes(task: str, question: str, answer: str) -> None:
    assert demo_tasks.check(task, question, f" {answer}\n")
    for wrong in ("", answer[:-1], answer + "0", f"It is {answer}"):
        assert not demo_tasks.check(task, question, wrong), wrong


@pytest.mark.parametrize("task", demo_tasks.TASKS)
def test_a_generated_answer_is_the_one_that_its_text_asks_for(task: str) -> None:
    first, again = random.Random(5), random.Random(5)
    for _ in range(300):
        question, answer = demo_tasks.generate(task, first)
        assert (question, answer) == demo_tasks.generate(task, again)
        assert task_of(question) == task
        assert demo_tasks.check(task, question, answer)


def test_an_unknown_task_or_text_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'divide' is not known: choose one of sum, product"):
        demo_tasks.generate("divide", random.Random(0))
    with pytest.raises(ValueError, match=r"'Add one and two\.' is no question of task 'sum'"):
        demo_tasks.check("sum", "Add one and two.", "3")


@pytest.mark.parametrize(
    ("task", "wordings"),
    [
        ("sum", ["What is {a} + {b}?", "What is {b} + {a}?", "Add {a} and {b}.", "Add {b} and {a}."]),
        ("product", ["What is {a} * {b}?", "Multiply {b} by {a}."]),
        ("compare", ["Which is larger, {a} or {b}?", "Which is smaller, {b} or {a}?"]),
        ("sort", ["Sort {a}{b}.", "Sort {b}{a}.", "Sort the digits {a}{b}."]),
        ("reverse", ["Reverse {word}.", "Spell {word} backwards."]),
        ("copy", ["Repeat: {word}", "Copy this: {word}"]),
    ],
)
def test_no_other_wording_or_order_of_a_held_out_question_is_trained_on(
    task: str, wordings: list[str]
) -> None:
    rng, sides = random.Random(8), []
    for _ in range(400):
        operands = {"a": rng.randrange(1000), "b": rng.randrange(1000)}
        word = "".join(rng.choices("ABCDEFGH", k=5))
        side = {demo_tasks.is_held_out(task, text.format(**operands, word=word)) for text in wordings}
        assert len(side) == 1, (operands, word)
        sides.append(side.pop())
    share = sum(sides) / len(sides)
    assert 0.05 < share < 0.17, f"{share:.3f} held out, meant is 1 in {demo_tasks.HELD_OUT_ONE_IN}"


def test_the_training_stream_never_shows_a_held_out_question() -> None:
    tokenizer = train_tokenizer()
    stream = conversations(tokenizer, random.Random(20))
    met = set()
    for _ in range(4096):
        question_ids, answer_ids = next(stream)
        text = tokenizer.decode(question_ids, skip_special_tokens=False)
        question = text.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        task = task_of(question)
        assert not demo_tasks.is_held_out(task, question), question
        assert demo_tasks.check(task, question, tokenizer.decode(answer_ids))
        met.add(task)
    assert met == set(demo_tasks.TASKS)


def test_the_shipped_questions_are_200_held_out_batch_lines_with_their_right_answers() -> None:
    questions = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (EXAMPLES / "answers.jsonl").read_text().splitlines()]
    ids = [line["custom_id"] for line in questions]
    assert ids == [line["custom_id"] for line in answers]
    assert len(set(ids)) == len(ids) == 200
    assert {line["task"] for line in answers} == set(demo_tasks.TASKS)
    for line, wanted in zip(questions, answers, strict=True):
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        assert (line["body"]["max_tokens"], line["body"]["temperature"]) == (32, 0)
        (message,) = line["body"]["messages"]
        assert message["role"] == "user"
        assert demo_tasks.is_held_out(wanted["task"], message["content"]), line["custom_id"]
        assert demo_tasks.solve(wanted["task"], message["content"]) == wanted["answer"]
