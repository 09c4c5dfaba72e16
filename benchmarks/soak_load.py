"""What a soak is made of: many short tasks, and which of their calls and tasks go wrong, and how.

Everything follows from the numbers of tasks and calls, so server, solver and report agree without a word.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.load import Load, StubSolver
from benchmarks.stub_model import MODEL, Behaviour
from ray_app import driver
from ray_app.chat import Router
from ray_app.config import BaseRun, Endpoint, ModelConfig, Price, TaskLimits
from ray_app.dataset import TaskSet
from ray_app.journal import Journal
from ray_app.prompting import Prompts
from ray_app.records import Task, digest
from ray_app.services import ServeConfig
from ray_app.slots import RouteKey, Slots
from ray_app.worker import Solved

TURNS = 2
REPLY_BYTES = 200
MEAN_S = 0.1
IN_FLIGHT = 128
WORKERS = 2
ATTEMPTS = 3
FIRST_TOKEN_S = 2.0
CATEGORIES = ("algebra", "botany", "chess")

# One call in a hundred meets one of these, each kind in turn, once; the client asks again.
CallFault = Literal["cut", "500", "429", "429 with Retry-After", "hang", "garbage", "error in mid-stream"]
CALL_FAULTS: tuple[CallFault, ...] = CallFault.__args__  # type: ignore[attr-defined]
ONE_CALL_IN = 100
_STRIDE = 37  # so that both calls of a task are met
# Of each thousand tasks: one whose first attempt raises, one that always does, one that is refused an answer.
TaskFault = Literal["raises once", "raises", "refused"]
TASK_FAULTS: dict[int, TaskFault] = {101: "raises once", 202: "raises", 303: "refused"}
ONE_TASK_IN = 1000


def call_fault(seed: int) -> CallFault | None:
    """What the first answer to the call with this seed is instead of an answer."""
    number, place = divmod(seed, ONE_CALL_IN)
    return CALL_FAULTS[number % len(CALL_FAULTS)] if place == _STRIDE * number % ONE_CALL_IN else None


def task_fault(task: int) -> TaskFault | None:
    return TASK_FAULTS.get(task % ONE_TASK_IN)


def is_refused(seed: int) -> bool:
    """Whether the call with this seed is refused, however often it is made: the second of its task."""
    task, turn = divmod(seed, TURNS)
    return turn == TURNS - 1 and task_fault(task) == "refused"


def planned_faults(tasks: int) -> Counter[TaskFault]:
    return Counter(fault for task in range(tasks) if (fault := task_fault(task)))


class Raised(RuntimeError):
    """Of a task that is made to break."""


@dataclass(frozen=True)
class SoakSolver:
    """Two calls of a model over HTTP; raises after them where the task is to."""

    stub: StubSolver
    router: Router

    async def solve(self, task: Task, journal: Journal) -> Solved:
        solved = await self.stub.solve(task, journal)
        fault = task_fault(int(task.task_id))
        if fault == "raises" or (fault == "raises once" and journal.base.attempt == 1):
            raise Raised(f"task {task.task_id} is made to break")
        return solved

    def slots(self) -> Mapping[RouteKey, Slots]:
        return self.router.slots

    async def close(self) -> None:
        await self.router.close()


@dataclass(frozen=True)
class MakeSolver:
    """The solver factory that travels to the workers."""

    load: Load
    models: Mapping[str, ModelConfig]

    def __call__(self) -> SoakSolver:
        router = Router(self.models, {}, environ={})
        return SoakSolver(StubSolver(self.load, router), router)


class SoakConfig(BaseRun):
    benchmark: Literal["soak"] = "soak"

    def routes(self) -> dict[str, str]:
        return {"orchestrator": MODEL, "judge": MODEL}

    def dataset_name(self) -> str:
        return "numbers"

    def expected_calls(self) -> dict[str, float]:
        return {MODEL: float(TURNS)}


class SoakJob(driver.Job):
    def protocol_label(self) -> str:
        return "soak"

    def plan_line(self) -> str:
        return f"{len(self.tasks)} tasks of {TURNS} calls"


def load_of(tasks: int, url: str) -> Load:
    return Load(tasks, TURNS, IN_FLIGHT, Behaviour(MEAN_S, REPLY_BYTES), url)


def job(load: Load, run_dir: Path) -> SoakJob:
    model = ModelConfig(
        # Fixed: with a 429 every few seconds an adaptive limit stays low, and the run takes an hour.
        endpoints=(Endpoint(base_url=load.url, concurrency=load.in_flight),),
        timeout_s=60,
        first_token_s=FIRST_TOKEN_S,
        price=Price(input=1, output=2),
    )
    config = SoakConfig(
        models={MODEL: model},
        limits=TaskLimits(wall_s=120),
        attempts=ATTEMPTS,
        concurrency=load.in_flight,
        workers=WORKERS,
        services=None,
    )
    tasks = tuple(
        Task(str(number), f"question {number}", str(number), category=CATEGORIES[number % len(CATEGORIES)])
        for number in range(load.tasks)
    )
    data = TaskSet(tasks, digest(load.tasks), "numbers", "", {})
    return SoakJob(config, data, Prompts({}, is_bundled=True), {}, run_dir, ServeConfig())


def drive() -> None:
    """One driver's life, in a process of its own: `run_dir tasks url with_pictures` on the command line."""
    load = load_of(int(sys.argv[2]), sys.argv[3])
    made = job(load, Path(sys.argv[1]))
    command = driver.Command(
        driver.make_console(),
        solver_for=lambda urls: MakeSolver(load, made.config.models),
        check=_nothing,
        with_pictures=sys.argv[4] == "True",
    )
    sys.exit(driver.carry_out(made, command))


async def _nothing(urls: Mapping[str, str]) -> dict[str, str]:
    """No service is used."""
    await asyncio.sleep(0)
    return {}
