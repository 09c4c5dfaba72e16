"""Gold replay: an agent and a user that make a task's gold calls, in their order, and say what is asked for.

No model, and no measure of one: it shows that loop, environment and evaluator agree, and how fast they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ray_app.tau2.dialogue import Call, Entry, Said, Side
from ray_app.tau2.simulation import STOP
from ray_app.tau2.tasks import Action, TaskSpec

HANDOVER = "Please go on."
FINISHED = "That is all that was to be done."


@dataclass
class GoldScript:
    """What both sides say next; one script serves both, since the gold calls have one order."""

    actions: Sequence[Action]
    told: Sequence[str] = ()
    done: int = 0
    is_told: bool = field(default=False, init=False)

    @classmethod
    def of(cls, spec: TaskSpec) -> GoldScript:
        criteria = spec.evaluation_criteria
        return cls((criteria and criteria.actions) or (), (criteria and criteria.communicate_info) or ())

    def next(self, side: Side) -> Said:
        """The next gold call where it is this side's; else a word to the other one, and at last the end."""
        if self.done < len(self.actions):
            action = self.actions[self.done]
            if action.requestor != side:
                return Said(side, HANDOVER)
            self.done += 1
            return Said(side, calls=(Call(f"gold_{self.done}", action.name, action.arguments, side),))
        if side == "user":
            return Said(side, STOP if self.is_told else HANDOVER)
        self.is_told = True
        return Said(side, " ".join([FINISHED, *self.told]))


@dataclass(frozen=True)
class GoldSpeaker:
    """One side of a gold replay."""

    script: GoldScript
    side: Side

    async def speak(self, entries: Sequence[Entry]) -> Said:
        return self.script.next(self.side)
