"""Verdicts: what is right without asking, what the judge is asked, and how its reply is read.

`toolorchestra`: equal text is right, anything else goes to the judge, who says true or false.
`hle-style`: the judge sees every response that says anything, and names the extracted answer, its
reasoning, correct, and the response's own confidence. A reply that cannot be read raises JudgeError:
never "wrong".
"""

from __future__ import annotations

import re
from typing import Literal

from ray_app import config, extract
from ray_app.errors import JudgeError
from ray_app.journal import Journal
from ray_app.prompting import Prompts
from ray_app.records import ChatReply, Message, Task, Verdict
from ray_app.tools.base import Answer, Caller

Protocol = Literal["toolorchestra", "hle-style"]
MAX_ANSWER_WORDS = 500

YES = {"true", "yes", "correct", "1"}
NO = {"false", "no", "incorrect", "wrong", "0"}


def without_judge(task: Task, prediction: str, response: str, protocol: Protocol) -> Verdict | None:
    """The verdict that needs no judge, or None. No answer is wrong under both protocols."""
    if protocol == "hle-style":
        return None if response.strip() else Verdict(False, "empty")
    if not prediction.strip() or len(prediction.split()) > MAX_ANSWER_WORDS:
        return Verdict(False, "empty")
    if prediction.strip().casefold() == task.answer.strip().casefold():
        return Verdict(True, "exact", extracted=prediction.strip())
    return None


def prompt(prompts: Prompts, task: Task, prediction: str, response: str, protocol: Protocol) -> str:
    """What the judge is asked about `prediction` (toolorchestra) or the whole `response` (hle-style)."""
    if protocol == "toolorchestra":
        return prompts.render(
            "judge_toolorchestra", question=task.question, prediction=prediction, reference=task.answer
        )
    return prompts.render("judge_hle", question=task.question, response=response, reference=task.answer)


def read(reply: str, prediction: str, judge_model: str, protocol: Protocol) -> Verdict:
    """The judge's reply as a verdict. Raises JudgeError, which shows the reply, when it holds none."""
    spoken = extract.without_thinking(reply)
    if protocol == "toolorchestra":
        return Verdict(
            _truth(extract.tagged(spoken, "correct"), reply), "judge", prediction, "", None, judge_model
        )
    fields = extract.json_object(spoken) or _labelled(spoken)
    return Verdict(
        is_correct=_truth(fields.get("correct"), reply),
        method="judge",
        extracted=str(fields.get("extracted_final_answer", "")),
        reasoning=str(fields.get("reasoning", "")),
        confidence=_percent(fields.get("confidence")),
        judge_model=judge_model,
    )


async def ask(
    caller: Caller,
    journal: Journal,
    task: Task,
    answer: Answer,
    *,
    settings: config.Judge,
    prompts: Prompts,
    protocol: Protocol,
) -> Verdict:
    """The judge's verdict, by one call. Raises JudgeError when its reply cannot be read: it is owed."""
    message = Message("user", prompt(prompts, task, answer.prediction, answer.response, protocol))

    def check(reply: ChatReply) -> Verdict:
        return read(reply.content, answer.prediction, settings.model, protocol)

    reply = await caller.ask(journal, "judge", settings.model, (message,), settings.sampling, check=check)
    return check(reply)


def _truth(value: object, reply: str) -> bool:
    first = re.search(r"[a-z0-9]+", str(value).casefold())
    if first and first.group() in YES:
        return True
    if first and first.group() in NO:
        return False
    raise JudgeError(f"judge reply {reply[:200]!r}: expected a verdict of true or false; judge it again")


def _labelled(text: str) -> dict[str, str]:
    """Fields written as `name: value` lines, as models do when they forget the JSON."""
    pattern = r"^\W*(extracted_final_answer|reasoning|correct|confidence)\W*:\s*(.*)$"
    return {name.lower(): value for name, value in re.findall(pattern, text, re.IGNORECASE | re.MULTILINE)}


def _percent(value: object) -> float | None:
    """A percentage as a fraction, 0 to 1; None where the judge gave no number."""
    number = re.search(r"\d+(?:\.\d+)?", str(value))
    return min(float(number.group()) / 100, 1.0) if number else None
