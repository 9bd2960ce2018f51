"""The demo model's six tasks: makes a question with its one right answer, and judges an answer's text.

Holds pure functions of a seeded `random.Random`, and the split between questions that training may use and
questions that only measure. Knows nothing of tokenizers, models or files. `train_demo_model.py` draws its
training rows here; `headrace demo` and the tests judge answers with `check`.
"""

import hashlib
import random
import re
from collections.abc import Callable

TASKS = ("sum", "product", "sort", "reverse", "compare", "copy")

#: One question in this many is never trained on.
HELD_OUT_ONE_IN = 10

_CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_WORD_LIST = """
able about acid across actor after again agree alarm album alive allow almost alone along also always amber
among anchor angle animal answer apple april apron arm arrow artist asleep atlas autumn avenue awake bacon
badge bake ball banana band bank barn basin basket beach bean bear beauty become bed before begin behind
bell below bench berry better bicycle bird bishop black blanket bloom blue board boat body bone book border
both bottle bowl branch brave bread break breeze brick bridge bright bring brother brown brush bucket build
burn butter button cabin cable cactus camel camera camp canal candle canyon captain carbon carpet carry
castle cat cave cedar cellar center chain chair chalk chapter cheese cherry chest child circle citrus city
clay clean clear clever cliff climb clock cloud clover coast cobalt coffee coin cold collar color comet
copper coral corner cotton country cousin crane crater cream creek crowd crystal cup curtain custom dance
danger dark dawn debate decide deep deer delta desert design desk diamond dinner doctor dog dolphin donkey
door double dragon drain dream dress drift drive drum dust eagle early earth east easy echo edge effort
eight elbow elder eleven empty energy engine enough equal escape evening every exact fabric falcon family
famous farm father feather fence fern ferry field fig filter finger finish fire fish flag flame flax floor
flour flower flute fog forest fork fortune fossil fountain fox friend frost fruit future galaxy garden
garlic gate gentle ghost giant ginger glacier glass globe glove goat gold goose grain grape grass gravel
green ground guest guitar hammer harbor harvest hat hazel heart heavy hedge helmet herb hill history honey
horse hotel hour house hunter ice idea igloo iron island ivory jacket jade jar jasmine jelly jewel join
journey juice jungle juniper kettle keyboard king kitchen kite knee knife knight ladder lake lamp lantern
laptop large laugh laurel lava lawn leaf leather lemon lens letter light lilac lime linen lion liquid little
lizard lobster lock logic lotus lucky lumber lunar magnet maple marble market marsh meadow melon memory
metal meteor middle mill mineral minute mirror mist modern moment monkey moon morning moss mother motor
mountain mouse music needle nest night noble north novel number nutmeg oak oasis oat ocean office olive
onion opal orange orbit orchard order otter oven owl oxygen oyster paddle page palace palm panel paper
parade park parrot pasture path peach pearl pebble pencil people pepper piano picnic pigeon pillow pilot
pine planet plate plum pocket poem pony poplar portrait potato pottery prairie present prism puzzle quarry
quartz queen quiet quill rabbit radio rain ranch raven reason ribbon ridge ring river road robin rocket roof
room rope rose ruby rust saddle saffron sail salmon salt sand sapphire saturn school season seed seven
shadow sheep shell ship shoe shore silk silver simple singer sister sky slate sleep slope slow small smoke
snow soap socket sofa soil solar song south space spark spice spider spoon spring spruce square stable stair
star station steam steel stone storm stove straw stream street string sugar summer sunset swan sweet table
tailor teacher temple tent thirty thread thunder tiger timber toast tomato tower train travel tree trumpet
tulip tunnel turtle twelve umbrella uncle valley vanilla velvet village violet violin voyage wagon walnut
water wave weather west whale wheat wheel whisper white wild willow wind window winter wizard wolf wonder
wood wool world yellow yogurt zebra zero
"""

#: Everyday words, so that "reverse" and "copy" also meet what a person would type.
WORDS = tuple(_WORD_LIST.split())

_FORMS: dict[str, tuple[str, ...]] = {
    "sum": ("What is {0} + {1}?", "Add {0} and {1}."),
    "product": ("What is {0} * {1}?", "Multiply {0} by {1}."),
    "sort": ("Sort the digits {0}.", "Sort {0}."),
    "reverse": ("Reverse {0}.", "Spell {0} backwards."),
    "compare": ("Which is larger, {0} or {1}?", "Which is smaller, {0} or {1}?"),
    "copy": ("Repeat: {0}", "Copy this: {0}"),
}

_SOLVE: dict[str, Callable[..., str]] = {
    "sum": lambda a, b: str(int(a) + int(b)),
    "product": lambda a, b: str(int(a) * int(b)),
    "sort": lambda digits: "".join(sorted(digits)),
    "reverse": lambda word: word[::-1],
    "copy": lambda text: text,
}


def generate(task: str, rng: random.Random) -> tuple[str, str]:
    """One question of `task` and its answer, both plain text; the same `rng` state gives the same pair.

    Raises ValueError when `task` is none of TASKS.
    """
    if task not in _FORMS:
        raise ValueError(f"task {task!r} is not known: choose one of {', '.join(TASKS)}")
    question = rng.choice(_FORMS[task]).format(*_OPERANDS[task](rng))
    return question, solve(task, question)


def solve(task: str, question: str) -> str:
    """The right answer to a question of `task`, read back from the question's own text.

    Raises ValueError when the text is no question that `generate(task, ...)` can make.
    """
    form, operands = _parse(task, question)
    if task == "compare":
        return str((max if "larger" in form else min)(map(int, operands)))
    return _SOLVE[task](*operands)


def check(task: str, question: str, answer_text: str) -> bool:
    """Whether `answer_text`, save blanks at its ends, is exactly the right answer."""
    return answer_text.strip() == solve(task, question)


def is_held_out(task: str, question: str) -> bool:
    """Whether the question belongs to the part that is never trained on.

    The split hashes the task and its operands without their order or the wording, so that neither `48 + 5`
    nor `Add 5 and 48.` gives `What is 5 + 48?` away, and no word is held out in one form only.
    """
    _, operands = _parse(task, question)
    if task == "sort":
        operands = ("".join(sorted(operands[0])),)
    key = "\0".join((task, *sorted(operands)))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def generate_split(task: str, rng: random.Random, held_out: bool) -> tuple[str, str]:
    """Like `generate`, from the held-out questions only, or from all the others."""
    while True:
        question, answer = generate(task, rng)
        if is_held_out(task, question) == held_out:
            return question, answer


def _parse(task: str, question: str) -> tuple[str, tuple[str, ...]]:
    for form, pattern in _PATTERNS.get(task, ()):
        if match := pattern.fullmatch(question):
            return form, match.groups()
    raise ValueError(f"{question!r} is no question of task {task!r}: it must read like {_FORMS.get(task)}")


def _number(rng: random.Random, most_digits: int) -> int:
    """A number of 1 to `most_digits` digits; longer ones are likelier, as there are more of them."""
    digits = rng.choices(range(1, most_digits + 1), weights=[4**n for n in range(most_digits)])[0]
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def _sum_operands(rng: random.Random) -> tuple[int, int]:
    return _number(rng, 2), _number(rng, 2)


def _product_operands(rng: random.Random) -> tuple[int, int]:
    pair = (rng.randrange(100), rng.randrange(10))
    return pair if rng.random() < 0.7 else pair[::-1]


def _sort_operands(rng: random.Random) -> tuple[str]:
    return ("".join(rng.choices("0123456789", k=rng.randint(3, 8))),)


def _reverse_operands(rng: random.Random) -> tuple[str]:
    if rng.random() < 0.3:
        return (rng.choice(WORDS).upper(),)
    return ("".join(rng.choices(_CAPITALS, k=rng.randint(3, 9))),)


def _compare_operands(rng: random.Random) -> tuple[int, int]:
    """Half of the pairs share their first digits: without these a model need only look at the first one."""
    a, b = _number(rng, 4), _number(rng, 4)
    if rng.random() < 0.5:
        shared = rng.randint(1, len(str(a)))
        b = int(str(a)[:shared] + "".join(rng.choices("0123456789", k=len(str(a)) - shared)))
    return (a, b) if a != b else (a, (a + 1) % 10_000)


def _copy_operands(rng: random.Random) -> tuple[str]:
    if rng.random() < 0.4:
        return (" ".join(rng.choices(WORDS, k=rng.randint(1, 5))),)
    return ("".join(rng.choices(_CAPITALS + "0123456789", k=rng.randint(3, 10))),)


_OPERANDS: dict[str, Callable[[random.Random], tuple[object, ...]]] = {
    "sum": _sum_operands,
    "product": _product_operands,
    "sort": _sort_operands,
    "reverse": _reverse_operands,
    "compare": _compare_operands,
    "copy": _copy_operands,
}

_OPERAND_PATTERN = {
    "sum": r"(\d+)",
    "product": r"(\d+)",
    "sort": r"(\d+)",
    "reverse": r"([A-Z]+)",
    "compare": r"(\d+)",
    "copy": r"([A-Za-z0-9 ]+)",
}

_PATTERNS = {
    task: tuple(
        (form, re.compile(re.escape(form).replace(r"\{0\}", operand).replace(r"\{1\}", operand)))
        for form in _FORMS[task]
    )
    for task, operand in _OPERAND_PATTERN.items()
}
