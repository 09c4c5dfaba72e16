"""Question templates over documented passages: each makes one draft from a random passage, or declines.

Pure functions of a random generator and the passages.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence

from ray_app.sample.passages import Draft, Passage, doing, is_unique, number_default, siblings

IF_NOT = " If the documents do not say, answer `not stated`."
ERROR = r"`*([A-Z]\w*(?:Error|Exception|Exit|Iteration))`*"
RAISES = re.compile(rf"\b[Rr]aises? (?:an? )?{ERROR} (?:if|when) ([^.;:]{{12,90}})\.")
Template = Callable[[random.Random, Sequence[Passage]], Draft | None]


def _which_does(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    passage = rng.choice(passages)
    does = doing(passage)
    if not does or not is_unique(passage, passages):
        return None
    question = f"Which function or method {does}?" + rng.choice(["", IF_NOT])
    return Draft(question, passage.name, (passage.name,))


def _default_of(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    passage = rng.choice(passages)
    if not passage.defaults:
        return None
    key = rng.choice(sorted(passage.defaults))
    question = rng.choice(
        [
            f"What is the default of the parameter `{key}` of `{passage.name}`?",
            f"Which value does `{key}` have when `{passage.name}` is called without it?",
        ]
    )
    return Draft(question + rng.choice(["", IF_NOT]), passage.defaults[key].strip("'"), (passage.name,))


def _which_raises(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    passage = rng.choice(passages)
    found = _raised(passage)
    if not found:
        return None
    error, condition = rng.choice(found)
    return Draft(f"Which exception does `{passage.name}` raise if {condition}?", error, (passage.name,))


def _raised(passage: Passage) -> list[tuple[str, str]]:
    """Pairs of an exception and the condition under which the passage says that it is raised."""
    return RAISES.findall(" ".join(passage.content.split()))


def _missing_word(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    passage = rng.choice(passages)
    found = re.findall(r"\b[a-z]{6,}\b", passage.summary)
    words = [word for word in found if passage.summary.count(word) == 1 and word not in passage.name]
    if not words or not 40 < len(passage.summary) < 160 or "->" in passage.summary:
        return None
    word = rng.choice(words)
    gap = passage.summary.replace(word, "____")
    return Draft(
        f'One word is missing in what is said of `{passage.name}`: "{gap}". Which?', word, (passage.name,)
    )


def _first_parameter(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    passage = rng.choice(passages)
    if len(passage.parameters) < 2:
        return None
    question = f"What is the first parameter of `{passage.name}` called, not counting self?"
    return Draft(question, passage.parameters[0], (passage.name,))


def _which_of_two(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    passage = rng.choice(passages)
    does = doing(passage)
    others = [other for other in siblings(passage, passages) if other.summary != passage.summary]
    if not does or not others:
        return None
    pair = [passage.name, rng.choice(others).name]
    rng.shuffle(pair)
    return Draft(f"Which of `{pair[0]}` and `{pair[1]}` {does}?", passage.name, tuple(pair))


def _shared_parameter(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    passage = rng.choice(passages)
    others = [o for o in siblings(passage, passages) if len({*o.parameters} & {*passage.parameters}) == 1]
    if not others or len(passage.parameters) < 2:
        return None
    other = rng.choice(others)
    shared = next(name for name in passage.parameters if name in other.parameters)
    question = f"Which parameter do `{passage.name}` and `{other.name}` have in common?"
    return Draft(question, shared, (passage.name, other.name))


def _larger_default(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    one, two = number_default(rng, passages), number_default(rng, passages)
    if one.value == two.value or one.name == two.name:
        return None
    both = f"`{one.parameter}` of `{one.name}` and `{two.parameter}` of `{two.name}`"
    question = f"{both} are numbers by default. Give the larger default of the two."
    return Draft(question, str(max(one.value, two.value)), (one.name, two.name))


def _two_exceptions(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    raising = [passage for passage in passages if _raised(passage)]
    one, two = rng.sample(raising, 2)
    (first, if_first), (second, if_second) = rng.choice(_raised(one)), rng.choice(_raised(two))
    if first == second:
        return None
    question = (
        f"Name the exception that `{one.name}` raises if {if_first}, and then the one that "
        f"`{two.name}` raises if {if_second}."
    )
    return Draft(question, f"{first} and {second}", (one.name, two.name))


def _difference(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    small, large = sorted(
        (number_default(rng, passages), number_default(rng, passages)), key=lambda d: d.value
    )
    if small.value == large.value or small.name == large.name:
        return None
    question = (
        f"By how much is the default `{large.parameter}` of `{large.name}` greater than the default "
        f"`{small.parameter}` of `{small.name}`?"
    )
    return Draft(question, str(large.value - small.value), (large.name, small.name))


def _expression(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    values = [rng.randint(2, 99) for _ in range(rng.randint(4, 7))]
    a, b = rng.randint(100, 999), rng.randint(12, 99)
    text, value, source = rng.choice(
        [
            (f"math.comb({b}, 4)", math.comb(b, 4), "math.comb"),
            (f"math.perm({b}, 3)", math.perm(b, 3), "math.perm"),
            (f"pow({a}, {b}, 1009)", pow(a, b, 1009), "pow"),
            (f"sum({values})", sum(values), "sum"),
            (f"sorted({values})[2]", sorted(values)[2], "sorted"),
            (f"({a * b}).bit_count()", (a * b).bit_count(), "int.bit_count"),
        ]
    )
    return Draft(rng.choice(["What is `{}`?", "Evaluate `{}`."]).format(text), str(value), (source,))


def _worded(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    a, b, c = rng.randint(10, 60), rng.randint(3, 9), rng.randint(100, 999)
    question, value, source = rng.choice(
        [
            (
                f"How many ways are there to choose {b} items from {a} without order?",
                math.comb(a, b),
                "math.comb",
            ),
            (f"What is the remainder when {c} to the power of {a} is divided by 101?", pow(c, a, 101), "pow"),
            (f"How many ones has {c * a} in binary?", (c * a).bit_count(), "int.bit_count"),
            (
                f"How many overlapping pairs does an iterator over {a} elements give?",
                a - 1,
                "itertools.pairwise",
            ),
            (
                f"Into how many hex digits does `secrets.token_hex` turn {a} bytes?",
                2 * a,
                "secrets.token_hex",
            ),
            (
                f"How many cut points separate {a} intervals of equal probability?",
                a - 1,
                "statistics.quantiles",
            ),
        ]
    )
    return Draft(question, str(value), (source,))


def _sum_of_defaults(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    one, two = number_default(rng, passages), number_default(rng, passages)
    if one.name == two.name:
        return None
    word, value = rng.choice([("sum", one.value + two.value), ("product", one.value * two.value)])
    both = f"the default `{one.parameter}` of `{one.name}` and the default `{two.parameter}` of `{two.name}`"
    return Draft(f"What is the {word} of {both}?", str(value), (one.name, two.name))


def _scaled_default(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    name, key, value = number_default(rng, passages)
    factor = rng.randint(3, 40)
    return Draft(f"Multiply the default `{key}` of `{name}` by {factor}.", str(value * factor), (name,))


def _choose_summary(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    passage = rng.choice(passages)
    texts = sorted({other.summary[:160] for other in siblings(passage, passages)} - {passage.summary})
    if len(texts) < 3 or not 10 < len(passage.summary) <= 160:
        return None
    options = [passage.summary, *rng.sample(texts, 3)]
    return _choice(rng, f"Which of these is said of `{passage.name}`?", options, passage)


def _choose_name(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    passage = rng.choice(passages)
    does = doing(passage)
    names = [other.name for other in siblings(passage, passages) if other.summary != passage.summary]
    if not does or len(names) < 3:
        return None
    options = [f"`{name}`" for name in (passage.name, *rng.sample(names, 3))]
    return _choice(rng, f"Which of these {does}?", options, passage)


def _choose_default(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
    name, key, value = number_default(rng, passages)
    passage = next(p for p in passages if p.name == name)
    options = [str(number) for number in (value, value + 1, value * 2 + 1, value * 10)]
    return _choice(rng, f"What is the default `{key}` of `{name}`?", options, passage)


def _choice(rng: random.Random, question: str, options: list[str], passage: Passage) -> Draft:
    right = options[0]
    rng.shuffle(options)
    lines = [f"{'ABCD'[index]}. {option}" for index, option in enumerate(options)]
    return Draft("\n".join([question, *lines]), "ABCD"[options.index(right)], (passage.name,))


def _withheld(template: Template) -> Template:
    """The template's question with its sources, and every twin of theirs, withheld."""

    def absent(rng: random.Random, passages: Sequence[Passage]) -> Draft | None:
        draft = template(rng, passages)
        if draft is None:
            return None
        summaries = {passage.summary for passage in passages if passage.name in draft.sources}
        last = {name.rsplit(".", 1)[-1] for name in draft.sources}
        twins = [p.name for p in passages if p.summary in summaries or p.name.rsplit(".", 1)[-1] in last]
        question = draft.question.removesuffix(IF_NOT) + IF_NOT
        return Draft(question, "not stated", (), tuple(sorted({*draft.sources, *twins})))

    return absent


# Kinds as often as among the sixty.
TEMPLATES: dict[str, list[Template]] = {
    "Lookup": [_which_does, _which_does, _default_of, _which_raises, _missing_word, _first_parameter],
    "Two passages": [
        *[_which_of_two] * 5,
        *[_shared_parameter] * 2,
        *(_larger_default, _two_exceptions, _difference),
    ],
    "Computation": [*[_expression] * 3, *[_worded] * 7, _sum_of_defaults, _scaled_default],
    "Multiple choice": [_choose_summary, _choose_name, _choose_default],
    "Absent": [_withheld(_which_does), _withheld(_default_of), _withheld(_which_raises)],
}
