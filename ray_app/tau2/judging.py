"""From a simulation to its verdict: the judge, and what a reward means. Of runs and of second opinions."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ray_app.config import Judge
from ray_app.journal import Journal
from ray_app.records import ChatReply, Message, Verdict
from ray_app.tau2.domain import Domain
from ray_app.tau2.reward import Reward
from ray_app.tau2.tasks import TaskSpec
from ray_app.tools.base import Caller


async def ask_judge(
    caller: Caller,
    journal: Journal,
    settings: Judge,
    domain: Domain,
    spec: TaskSpec,
    asked: Sequence[Message],
) -> str:
    """The judge's reply, checked; "" where nothing is asked. Raises JudgeError where it cannot be read."""
    if not asked:
        return ""

    def check(reply: ChatReply) -> None:
        domain.check_judged(spec, reply.content)

    reply = await caller.ask(journal, "judge", settings.model, tuple(asked), settings.sampling, check=check)
    return reply.content


def verdict_of(reason: str, reward: Reward, settings: Judge) -> Verdict:
    """A simulation is right where its reward is 1; the judge is named where it had a part in that."""
    told = {"reason": reason, "parts": dict(reward.parts), "note": reward.note}
    judge_model = settings.model if "NL_ASSERTION" in reward.parts else ""
    return Verdict(reward.value == 1.0, "reward", reasoning=json.dumps(told), judge_model=judge_model)
