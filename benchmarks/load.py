"""What the engine is loaded with: tasks that ask a stub model some turns each, and their ideal makespan."""

from __future__ import annotations

import heapq
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.stub_model import MODEL, Behaviour, InProcessModel
from ray_app.chat import ChatClient, ChatRequest, Router
from ray_app.config import Endpoint, ModelConfig, Sampling
from ray_app.journal import Journal
from ray_app.records import ChatReply, Message, Task, Verdict
from ray_app.tools.base import Caller
from ray_app.worker import Solved

SYSTEM = "You are asked the same thing until the benchmark ends. " * 10
GO_ON = "Go on."

# What a caller asks of a model's config; its address is not used. No transcript is too long for it.
MODELS = {MODEL: ModelConfig(endpoints=(Endpoint(base_url="http://127.0.0.1:9/v1"),), context_length=10**9)}


@dataclass(frozen=True, slots=True)
class Load:
    """What a run is made of. `url` is that of the model's server; without one the model is in process.

    Calls that are not journalled go to the model directly: they are neither checkpointed nor logged.
    `evidence` is a folder in which an in-process model notes its calls, beside the log and its writers.
    """

    tasks: int
    turns: int
    in_flight: int
    behaviour: Behaviour
    url: str = ""
    is_journalled: bool = True
    evidence: str = ""

    def latency_s(self, task: int, turn: int) -> float:
        return self.behaviour.latency_s(self.call_seed(task, turn))

    def call_seed(self, task: int, turn: int) -> int:
        return task * self.turns + turn

    def durations_s(self) -> list[float]:
        """What each task takes where nothing but the model takes time."""
        return [sum(self.latency_s(task, turn) for turn in range(self.turns)) for task in range(self.tasks)]

    @property
    def ideal_s(self) -> float:
        return makespan_s(self.durations_s(), self.in_flight)

    @property
    def calls(self) -> int:
        return self.tasks * self.turns

    @property
    def text_bytes(self) -> int:
        """All that the model says, which is different in each call."""
        return self.calls * self.behaviour.reply_bytes

    def work(self) -> list[Task]:
        return [Task(str(number), f"question {number}", str(number)) for number in range(self.tasks)]


def makespan_s(durations_s: Iterable[float], slots: int) -> float:
    """When the last task ends if each, in order, starts on the slot that is free first."""
    free = [0.0] * slots
    for duration_s in durations_s:
        heapq.heapreplace(free, free[0] + duration_s)
    return max(free)


class WitnessedModel(InProcessModel):
    """Notes what happens to each call in a file of this process, line by line: a death loses no line.

    `sent` and `ended` are the model's; `acked` is noted where the journal has returned the reply.
    """

    def __init__(self, behaviour: Behaviour, folder: Path) -> None:
        super().__init__(behaviour)
        self._file = os.open(folder / str(os.getpid()), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def note(self, what: str, rollout_key: str, number: int) -> None:
        os.write(self._file, f"{what} {rollout_key} {number} {time.time():.6f} {os.getpid()}\n".encode())

    async def complete(self, request: ChatRequest) -> ChatReply:
        number = request.sampling.seed or 0
        self.note("sent", request.session, number)
        reply = await super().complete(request)
        self.note("ended", request.session, number)
        return reply


@dataclass(frozen=True)
class MakeSolver:
    """The solver factory that travels to the workers."""

    load: Load

    def __call__(self) -> StubSolver:
        if self.load.evidence:
            return StubSolver(self.load, WitnessedModel(self.load.behaviour, Path(self.load.evidence)))
        if not self.load.url:
            return StubSolver(self.load, InProcessModel(self.load.behaviour))
        model = ModelConfig.model_validate({"endpoints": (Endpoint(base_url=self.load.url),)})
        return StubSolver(self.load, Router({MODEL: model}, {}, environ={}))


@dataclass(frozen=True)
class StubSolver:
    """Asks the model `turns` times, each time with all that was said before."""

    load: Load
    client: ChatClient

    async def solve(self, task: Task, journal: Journal) -> Solved:
        """The prediction lists the seconds from the end of each in-process call to its return.

        A call that the journal serves from its record has no end, and is not listed.
        """
        said: tuple[Message, ...] = (Message("system", SYSTEM), Message("user", task.question))
        waits: list[float] = []
        for turn in range(self.load.turns):
            journal.turn = turn
            started = journal.timer()
            reply = await self._ask(journal, said, turn)
            if isinstance(self.client, InProcessModel) and task.rollout_key in self.client.ended:
                waits.append(round(time.monotonic() - self.client.ended.pop(task.rollout_key), 6))
            said += (Message("assistant", reply.content), Message("user", GO_ON))
            if self.load.is_journalled:
                journal.note("turn", started=started)
        return Solved(json.dumps(waits), Verdict(True, "exact"))

    async def _ask(self, journal: Journal, said: tuple[Message, ...], turn: int) -> ChatReply:
        seed = self.load.call_seed(int(journal.task.task_id), turn)
        sampling = Sampling.model_validate({"seed": seed})
        if self.load.is_journalled:
            reply = await Caller(self.client, MODELS).ask(journal, "orchestrator", MODEL, said, sampling)
            if isinstance(self.client, WitnessedModel):
                self.client.note("acked", journal.task.rollout_key, seed)
            return reply
        request = ChatRequest(MODEL, said, sampling, session=journal.task.rollout_key)
        return await self.client.complete(request)

    async def close(self) -> None:
        if isinstance(self.client, Router):
            await self.client.close()
