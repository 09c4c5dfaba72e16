"""The config of a tau2 run: `jobs/tau2.py --config FILE` reads it."""

from __future__ import annotations

import random
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ray_app.config import Alias, BaseRun, Judge, Retriever, Sampling, Section, TaskLimits, summed

# tau2 derives the seeds of a run's trials so, each up to this.
MAX_SEED = 1_000_000


class SideSampling(Sampling):
    temperature: float | None = Field(0.0, ge=0)
    max_tokens: int = Field(8000, gt=0)


class Side(Section):
    """The model that speaks for one side. Its sampling's seed is the trial's, unless it has its own."""

    model: str
    sampling: SideSampling = SideSampling()


class DialogueLimits(TaskLimits):
    """A step is one message, or one round of tool calls; `max_errors` counts tools that failed."""

    max_steps: int = Field(200, gt=0)
    max_errors: int = Field(10, gt=0)


class Tau2Config(BaseRun):
    """Which domains, who speaks, who judges."""

    benchmark: Literal["tau2"] = "tau2"
    domains: tuple[str, ...] = Field(("service_desk",), min_length=1, description="interleaved")
    split: str = Field("base", description="of each domain's tasks")
    limit: int | None = Field(None, gt=0, description="tasks of each domain; null for all")
    solo: bool = Field(False, description="the agent works on tickets alone, with both sides' tools")
    seed: int | None = Field(300, description="of the run; each trial's follows from it, as in tau2")
    orchestrator: Side
    experts: dict[str, Alias] = Field({}, description="alias -> expert that may write a turn; {} for none")
    user: Side
    judge: Judge
    retriever: Retriever | None = Field(None, description="a retriever to start and ask for its health")
    limits: DialogueLimits = DialogueLimits()

    @model_validator(mode="after")
    def _each_domain_once(self) -> Self:
        if len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains: expected each domain once, got {', '.join(self.domains)}")
        return self

    def routes(self) -> dict[str, str]:
        experts = {f"experts.{name}": alias.model for name, alias in self.experts.items()}
        sides = {"orchestrator": self.orchestrator.model, **experts, "user": self.user.model}
        return {**sides, "judge": self.judge.model}

    def dataset_name(self) -> str:
        return "-".join(self.domains)

    def expected_calls(self) -> dict[str, float]:
        """A dozen turns of the agent, of which experts write a third; half as many of the user."""
        parts = [(self.orchestrator.model, 12.0), (self.user.model, 6.0), (self.judge.model, 0.5)]
        return summed([*parts, *((each.model, 4.0 / len(self.experts)) for each in self.experts.values())])

    def retriever_used(self) -> Retriever | None:
        return self.retriever

    def measured(self) -> dict[str, Any]:
        return {**super().measured(), "experts": self.told(self.experts)}


def trial_seed(seed: int | None, trial: int) -> int | None:
    """The seed of a trial (0, 1, ...), as tau2 derives it from the run's; None where the run has none."""
    if seed is None:
        return None
    draws = random.Random(seed)
    return [draws.randint(0, MAX_SEED) for _ in range(trial + 1)][-1]
