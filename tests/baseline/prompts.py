"""Prompts as the agent renders them, for tests of single rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_app.prompting import load_prompts

PROMPTS = load_prompts()
DOCUMENTS = (
    "textwrap.wrap(text, width=70, **kwargs)\n\nWrap a single paragraph of text, returning a list of lines.",
    "pprint.pprint(object, stream=None, indent=1, width=80)\n\nPretty-print a Python object to a stream.",
    "heapq.heappop(heap, /)\n\nPop the smallest item off the heap.\n\nAn IndexError is raised if the heap is "
    "empty.",
    "uuid.getnode()\n\nGet the hardware address as a 48-bit positive integer.",
    "sys.intern(string, /)\n\nEnter the string in the table of interned strings. It is initially empty.",
)


def context(documents: Sequence[str] = DOCUMENTS, output: str = "") -> str:
    shown = "".join(f"Doc {n}: {text}\n\n" for n, text in enumerate(documents, 1))
    code = f"```python\nprint(1)\n```\n\n```output\n{output}\n```\n\n" if output else ""
    return (f"Documents:\n\n{shown}" if shown else "") + code


def user(text: str, system: str = "") -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    return {"model": "baseline", "messages": [*messages, {"role": "user", "content": text}]}


def answer_request(question: str, gathered: str, *, confidence: bool = False) -> dict[str, Any]:
    asked = PROMPTS.render("answer_confidence").rstrip("\n") if confidence else ""
    return user(PROMPTS.render("answer_tags", context=gathered, question=question, confidence=asked))


def boxed_request(question: str, gathered: str, *, confidence: bool = False) -> dict[str, Any]:
    asked = PROMPTS.render("answer_confidence").rstrip("\n") if confidence else ""
    text = PROMPTS.render("answer_boxed", context=gathered, question=question, confidence=asked)
    return user(text, PROMPTS.render("answer_boxed_system").strip())


def expert_request(template: str, question: str, gathered: str = "") -> dict[str, Any]:
    """`template`: search or reasoning."""
    return user(PROMPTS.render(template, context=gathered, question=question))


def tool(name: str, *aliases: str, description: str = "") -> dict[str, Any]:
    model = {"type": "string", "enum": list(aliases) or [f"{name}-1"], "description": description}
    parameters = {"type": "object", "properties": {"model": model}, "required": ["model"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = (tool("enhance_reasoning"), tool("search"), tool("answer"))


def turn_request(
    question: str, gathered: str = "", feedback: str = "", tools: Sequence[dict[str, Any]] = TOOLS
) -> dict[str, Any]:
    told = PROMPTS.render("feedback", reason=feedback) if feedback else ""
    text = PROMPTS.render("orchestrator", question=question, context=gathered, feedback=told)
    system = PROMPTS.render("orchestrator_system").strip()
    return {**user(text, system), "tools": list(tools)}
