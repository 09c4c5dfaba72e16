"""The coder: a program for what a question asks to be computed.

Three sources of programs: expressions in backticks, arithmetic in words (a table of patterns), and
defaults that the documents' signatures give. Where none fits, the program prints the question's
numbers, marks nothing as a value, and the reader goes without.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Sequence

from ray_app.baseline.prompt import Document, Question

# What the reader takes for a result; the program's other lines are steps.
VALUE = "value: "
NUMBER = r"-?\d+(?:\.\d+)?"
LIST = rf"((?:{NUMBER}(?:, | and |, and )?)+)"
QUANTITY = re.compile(
    r"\b(?:sum|product|add|multiply|multiplied|subtract|difference|remainder|divided|mean|median|power|"
    r"how many|altogether|evaluate|in total|factorial|divisor)\b",
    re.IGNORECASE,
)
DEFAULT = re.compile(r"`(\w+)` (?:parameter )?(?:of|in) `([\w.]+)`")


def is_computational(question: str) -> bool:
    """Whether a program could help: an expression to evaluate, or numbers or defaults to combine."""
    if expressions(question):
        return True
    is_asked = QUANTITY.search(question) is not None
    has_numbers = re.search(r"(?<![\w.])\d", _without_code(question)) is not None
    return is_asked and (has_numbers or len(DEFAULT.findall(question)) > 0)


def program(question: Question, documents: Sequence[Document]) -> str:
    """A complete Python program; `value: ` stands before each result."""
    text = question.text
    found = expressions(text)
    if not found:
        found = _from_defaults(text, documents) or _from_words(text)
    lines = [f"import {name}" for name in sorted(_modules(found))]
    for number, expression in enumerate(found, 1):
        lines += [f"step_{number} = {expression}", f"print({VALUE!r} + str(step_{number}))"]
    if not found:
        numbers = re.findall(NUMBER, _without_code(text))
        lines = [f"numbers = [{', '.join(numbers)}]", "print('numbers of the question:', numbers)"]
    return "\n".join(lines)


def expressions(text: str) -> list[str]:
    """The expressions in backticks that compute something: a call or an operator on literals."""
    return [code for code in re.findall(r"`([^`]+)`", text) if _computes(code)]


def _computes(code: str) -> bool:
    try:
        tree = ast.parse(code, mode="eval")
    except (SyntaxError, ValueError):
        return False
    calls = any(isinstance(node, ast.Call | ast.BinOp) for node in ast.walk(tree))
    return calls and any(isinstance(node, ast.Constant) for node in ast.walk(tree))


def _modules(found: Sequence[str]) -> set[str]:
    """Modules of the standard library that the expressions name."""
    trees = [ast.parse(code, mode="eval") for code in found]
    attributes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    roots = {node.value.id for node in attributes if isinstance(node.value, ast.Name)}
    return {name for name in roots if name in sys.stdlib_module_names}


def _from_words(text: str) -> list[str]:
    plain = _without_code(text)
    for pattern, write in PATTERNS:
        match = re.search(pattern, plain, re.IGNORECASE)
        if match:
            return [write(match)]
    return []


def _without_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "", text)


def _numbers(text: str) -> str:
    return ", ".join(re.findall(NUMBER, text))


def _statistic(match: re.Match[str]) -> str:
    kind, name = (match[1] or "").strip().lower(), match[2].lower()
    name = {"average": "mean"}.get(name, name)
    name = f"{kind}_mean" if kind in {"harmonic", "geometric"} else name
    return f"statistics.{name}([{_numbers(match[3])}])"


def _choices(n: str, k: str, text: str) -> str:
    ordered = re.search(r"\b(?:with|in) (?:regard to )?order|arrange|ordered", text)
    return f"math.{'perm' if ordered else 'comb'}({n}, {k})"


Writer = Callable[[re.Match[str]], str]
# English arithmetic -> Python; the first pattern that fits is taken.
PATTERNS: tuple[tuple[str, Writer], ...] = (
    (
        rf"remainder (?:when|of|if) ({NUMBER})(?: (?:raised )?to the power (?:of )?({NUMBER}))?"
        rf".*?divided by ({NUMBER})",
        lambda m: f"pow({m[1]}, {m[2] or 1}, {m[3]})",
    ),
    (rf"({NUMBER}) (?:raised )?to the power (?:of )?({NUMBER})", lambda m: f"{m[1]} ** {m[2]}"),
    (rf"((?:harmonic|geometric|arithmetic) )?\b(mean|average|median|mode) of {LIST}", _statistic),
    (rf"sum of {LIST}", lambda m: f"sum([{_numbers(m[1])}])"),
    (rf"product of {LIST}", lambda m: f"math.prod([{_numbers(m[1])}])"),
    (rf"difference (?:between|of) ({NUMBER}) and ({NUMBER})", lambda m: f"abs({m[1]} - {m[2]})"),
    (rf"greatest common divisor of {LIST}", lambda m: f"math.gcd({_numbers(m[1])})"),
    (rf"least common multiple of {LIST}", lambda m: f"math.lcm({_numbers(m[1])})"),
    (rf"factorial of ({NUMBER})", lambda m: f"math.factorial({m[1]})"),
    (
        r"(\d+) \w+ (?:can )?be (?:chosen|picked|selected) from (\d+)",
        lambda m: _choices(m[2], m[1], m.string),
    ),
    (
        r"(?:choose|pick|select) (\d+) (?:\w+ )?(?:from|of|out of) (\d+)",
        lambda m: _choices(m[2], m[1], m.string),
    ),
    (r"\bones\b.*?\b(\d+)\b.*binary|\bones\b.*binary.*?\b(\d+)\b", lambda m: f"({m[1] or m[2]}).bit_count()"),
    (
        r"days (?:between|from) (\d{4}-\d\d-\d\d) (?:and|to) (\d{4}-\d\d-\d\d)",
        lambda m: f"abs(datetime.date.fromisoformat('{m[2]}') - datetime.date.fromisoformat('{m[1]}')).days",
    ),
)


def _from_defaults(text: str, documents: Sequence[Document]) -> list[str]:
    """A combination of numeric defaults, when the documents give every one that the question names."""
    signatures = {document.name: document.signature for document in documents}
    values = [default_of(signatures.get(name, ""), key) for key, name in DEFAULT.findall(text)]
    numbers = [value for value in values if value and re.fullmatch(NUMBER, value)]
    if not values or len(numbers) != len(values):
        return []
    factors = re.findall(rf"\bby ({NUMBER})\b", text)
    for words, operator in (
        (r"product|multipl|times", " * "),
        (r"difference|subtract", " - "),
        (r"sum|add|plus", " + "),
    ):
        if re.search(words, text, re.IGNORECASE):
            return [operator.join([*numbers, *factors])]
    return []


def default_of(signature: str, parameter: str) -> str:
    """The source text of a parameter's default in a signature; empty where there is none."""
    match = re.search(
        rf"\b{re.escape(parameter)}(?:: [^=,()]+)?\s?=\s?('[^']*'|\([^()]*\)|<[^>]*>|[^,()]+)", signature
    )
    return match[1].strip() if match else ""
