"""The reader: the shortest piece of the shown text that answers the question.

Each rule looks at one cue of the question ("which exception", "default", "how many") and takes what such
an answer looks like from the sentences that share most words with the question. It invents nothing: an
answer is a name, a number, a quotation or a clause of a document, a letter, or a program's result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ray_app.baseline import coder
from ray_app.baseline.evidence import Evidence
from ray_app.baseline.language import NUMBERS, STOP, content_words, coverage, stem
from ray_app.baseline.prompt import Document, Shown

NOT_STATED = "not stated"
MIN_SUPPORT = 0.45
FAILED = ("[exit status", "[stopped", "[not run", "[no output]", "Traceback")
EXCEPTION = re.compile(r"\b[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Iteration|Warning)\b")
FIGURE = re.compile(rf"(?<![\w.])(\d+)(?:-\w+)?\b|\b({'|'.join(NUMBERS)})\b")
QUOTED = re.compile(r"(?<!\w)(['\"])([^'\"\s]{1,20})\1(?!\w)")
DEFAULT_CUES = r"default|without (?:an?|it)\b|unless\b|if (?:no|none)\b|no \w+ is (?:passed|given)"
IDENTIFIER = re.compile(r"\b(?:[A-Z]{2,}\w*|[A-Z][a-z]+[A-Z]\w*|[a-z]+_\w+)\b")


class Reading(NamedTuple):
    """`support`: how far the documents or a program back the answer, 0 to 1."""

    answer: str
    support: float


def answer(shown: Shown) -> Reading:
    """The answer to the question that the prompt shows."""
    evidence = Evidence(shown.question.text, shown.documents)
    computed = results(shown.outputs) if coder.is_computational(shown.question.text) else []
    if shown.question.options:
        return _choice(shown, evidence, computed)
    if computed:
        return Reading(computed[-1], 0.9)
    if shown.question.may_be_absent and evidence.support < MIN_SUPPORT:
        return Reading(NOT_STATED, 1 - evidence.support)
    if not shown.documents:
        return Reading("unknown", 0.0)
    for cue, rule in RULES:
        found = rule(evidence) if re.search(cue, evidence.question, re.IGNORECASE) else ""
        if found:
            return Reading(found, evidence.support)
    return Reading(_clause(evidence), evidence.support / 2)


def results(outputs: Iterable[str]) -> list[str]:
    """The values that programs printed as results; a failed program gives none."""
    good = [output for output in outputs if not any(mark in output for mark in FAILED)]
    lines = [line for output in good for line in output.splitlines()]
    return [line.removeprefix(coder.VALUE) for line in lines if line.startswith(coder.VALUE)]


def _choice(shown: Shown, evidence: Evidence, computed: list[str]) -> Reading:
    """The option that a program's result equals, else the one that the documents speak of most."""
    options = shown.question.options
    for letter, option in options:
        if option.strip("`'") in computed:
            return Reading(letter, 0.9)
    scores = [_option_score(option, evidence) for _, option in options]
    top = max(scores)
    margin = top - sorted(scores)[-2]
    return Reading(options[scores.index(top)][0], min(1.0, 0.25 + margin))


def _option_score(option: str, evidence: Evidence) -> float:
    """Agreement of an option with the evidence: its own document, a default, or a sentence."""
    name = option.strip("`")
    own = [document for document in evidence.documents if document.name == name]
    if own:
        return 1 + coverage(evidence.wanted, content_words(own[0].text), evidence.weight)
    if evidence.named and name in _defaults(evidence):
        return 2.0
    words = content_words(option)
    if not words:
        return 0.0
    return max(
        (coverage(words, content_words(s.text), evidence.weight) * s.score for s in evidence.best),
        default=0.0,
    )


def _one_of_two(evidence: Evidence) -> str:
    """Of two named things, the one whose own words the question uses."""
    if len(evidence.named) != 2:
        return ""
    first, second = (set(content_words(document.body)) for document in evidence.named)
    wanted = set(evidence.wanted)
    scores = [
        sum(evidence.weight.get(w, 0.0) for w in wanted & one) for one in (first - second, second - first)
    ]
    return evidence.named[scores[1] > scores[0]].name


def _shared_parameter(evidence: Evidence) -> str:
    if len(evidence.named) < 2:
        return ""
    value = FIGURE.search(evidence.question)
    common = [
        name
        for name in _parameters(evidence.named[0])
        if all(name in _parameters(other) for other in evidence.named[1:])
        and (not value or coder.default_of(evidence.named[0].signature, name) == value[1])
    ]
    return common[0] if common else ""


def _extreme_default(evidence: Evidence) -> str:
    """The larger or smaller of numeric defaults."""
    figures = [float(value) for value in _defaults(evidence) if re.fullmatch(r"-?\d+(?:\.\d+)?", value)]
    if len(figures) < 2:
        return ""
    is_small = re.search(r"\b(?:smaller|smallest|lower|least|minimum)\b", evidence.question)
    return f"{(min if is_small else max)(figures):g}" if max(figures) < 1e6 else f"{max(figures):.0f}"


def _default(evidence: Evidence) -> str:
    return next(iter(_defaults(evidence)), "")


def _defaults(evidence: Evidence) -> list[str]:
    """Defaults of the parameters that the question mentions, from the named or best document's signature."""
    documents = evidence.named or [row.document for row in evidence.ranked[:1]]
    mentioned = {
        word.lower() for word in re.findall(r"\w+", re.sub(r"`\w+\.[\w.]+`", " ", evidence.question))
    }
    found = []
    for document in documents:
        keys = [name for name in _parameters(document) if name.lower() in mentioned]
        found += [coder.default_of(document.signature, key) for key in keys]
    return [value.strip("'") for value in found if value]


def _parameters(document: Document) -> list[str]:
    names = re.findall(r"(?<=[(, *])([A-Za-z_]\w*)(?=[=,:)])", document.signature)
    return [name for name in names if name not in ("self", "cls", "type")]


def _exception(evidence: Evidence) -> str:
    """The exception of the best sentence; of two named things, one that both speak of."""
    found = [EXCEPTION.findall(document.body) for document in evidence.named]
    if len(found) > 1:
        both = [name for name in found[0] if name in found[1]]
        return both[0] if both else ""
    return _first_in_sentences(evidence, EXCEPTION.findall)


def _name(evidence: Evidence) -> str:
    """The name of the best document that the question does not name itself."""
    others = (row.document.name for row in evidence.ranked if row.document.name)
    return next((name for name in others if name not in evidence.names), "")


def _figure(evidence: Evidence) -> str:
    return _first_in_sentences(evidence, lambda text: [a or b for a, b in FIGURE.findall(text)])


def _quoted(evidence: Evidence) -> str:
    return _first_in_sentences(evidence, lambda text: [quoted for _, quoted in QUOTED.findall(text)])


def _identifier(evidence: Evidence) -> str:
    """The identifiers of the best sentence that has any, joined where the question asks for several."""
    is_plural = re.search(r"\b(?:two|three|both)\b", evidence.question, re.IGNORECASE)
    for sentence in evidence.best:
        found = [name for name in IDENTIFIER.findall(sentence.text) if name not in evidence.question]
        if found:
            return " and ".join(dict.fromkeys(found[:2])) if is_plural else found[0]
    return ""


def _first_in_sentences(evidence: Evidence, find: Callable[[str], list[str]]) -> str:
    """The first finding, in the best sentence that holds one, that the question does not hold itself."""
    for sentence in evidence.best:
        for found in find(sentence.text):
            if not re.search(rf"(?<!\w){re.escape(found)}(?!\w)", evidence.question):
                return found
    return ""


def _clause(evidence: Evidence) -> str:
    """The best sentence less its brackets, its conditions, and at both ends the question's own words."""
    if not evidence.best:
        return ""
    text = re.sub(r"\s*\([^()]*\)", "", evidence.best[0].text).rstrip(".")
    main = [part for part in text.split(", ") if not re.match(r"(?:If|When|Unless|For)\b", part)]
    words = (", ".join(main) or text).split()
    known = {stem(word) for word in re.findall(r"\w+", evidence.question)}
    while len(words) > 1 and _is_known(words[0], known):
        words.pop(0)
    while len(words) > 1 and _is_known(words[-1], known):
        words.pop()
    return " ".join(words)


def _is_known(word: str, known: set[str]) -> bool:
    plain = re.sub(r"\W", "", word)
    return plain.lower() in STOP or stem(plain) in known


# (cue in the question, rule), in order: the first rule that finds something answers.
RULES: tuple[tuple[str, Callable[[Evidence], str]], ...] = (
    (r"\b(?:exception|error)\b", _exception),
    (r"\b(?:larger|smaller|largest|smallest|higher|lower)\b.*\b(?:two|default)", _extreme_default),
    (r"\bparameter\b.*\b(?:both|common)\b", _shared_parameter),
    (r"\b(?:which|what|of)\b.*`.+\band `|` and `.*\bwhich\b", _one_of_two),
    (r"\b(?:which|what|name the)\b (?:\w+ ){0,3}?(?:function|method|class|module|tool|member)", _name),
    (rf"\b(?:{DEFAULT_CUES})", _default),
    (r"\b(?:character|string|letter|symbol|sign)\b", _quoted),
    (r"\b(?:how (?:many|long|large|often|wide|big|deep)|number|port|size|year|value)\b", _figure),
    (r"\b(?:variable|attribute|object|type)s?\b", _identifier),
)
