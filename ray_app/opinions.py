"""Second opinions: which counted results of a run another judge is to judge, and what it has said so far.

A second opinion is a `verdict` row of role `judge` in the run's log, whose `alias` is its label and
whose `detail` says with what it was made. Result rows are only read: the run's score stays what it was.
Here nothing is asked and nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import yaml

from ray_app import config, events, extract, judge, services
from ray_app.config import BaseRun, RunConfig, load
from ray_app.driver import Job
from ray_app.errors import ConfigError, DatasetError, RunDirError, StorageError
from ray_app.hle import HleJob, read_tasks
from ray_app.journal import Journal
from ray_app.prompting import load_prompts
from ray_app.records import Task, Verdict, digest
from ray_app.services import ServeConfig
from ray_app.tools.base import Answer, Caller

# What another judge may differ in; the rest of the config says what the run was.
CHANGEABLE = ("judge", "models", "concurrency", "services", "endpoints_file", "dataset")
TEMPLATES: dict[judge.Protocol, str] = {
    "toolorchestra": "judge_toolorchestra",
    "hle-style": "judge_hle",
}
Key = tuple[str, int]


class Reviewer(Protocol):
    """How the results of one benchmark are judged again. A subject is what a result is judged by."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a verdict, beside the task and the subject."""
        ...

    def subjects(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[Key, Any]:
        """Of the counted results that have one. Raises StorageError, ConfigError."""
        ...

    def request(self, task: Task, subject: Any) -> str:
        """The digest of all that decides the verdict."""
        ...

    def needs_asking(self, task: Task, subject: Any) -> bool:
        """Whether the verdict takes a call."""
        ...

    async def verdict(self, caller: Caller, journal: Journal, task: Task, subject: Any) -> Verdict:
        """Raises JudgeError where the judge's reply holds none."""
        ...

    def missing(self, task_id: str) -> str:
        """What is wrong where a task of the run is not there, and what to do."""
        ...


@dataclass(frozen=True)
class JudgePass:
    """Another judge for a run, read and checked. `job` is the run's with that judge in its config.

    `names`: of the run's own judge and of this one, with their protocols.
    """

    job: Job
    label: str
    own: BaseRun
    judge: config.Judge
    reviewer: Reviewer
    names: tuple[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        return self.reviewer.settings


@dataclass(frozen=True, slots=True)
class Item:
    """One result to judge, with its first and its stored second verdict; None where there is none.

    `request` is the digest of all that decides the second one. `has_other_reference`: the first was
    given against a reference answer that the dataset has no more.
    """

    task: Task
    trial: int
    attempt: int
    subject: Any
    request: str
    has_other_reference: bool
    first: bool | None = None
    second: bool | None = None


@dataclass(frozen=True)
class Work:
    """Every counted result with something to judge; `skipped` counts those without."""

    items: tuple[Item, ...]
    skipped: int

    @property
    def left(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.second is None)


def read_pass(
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    prompts: str | None = None,
    protocol: judge.Protocol | None = None,
    label: str | None = None,
) -> JudgePass:
    """The run in `run_dir` under another judge. Raises UserError; asks and writes nothing."""
    saved = config_file(run_dir)
    check_overrides(overrides, CHANGEABLE)
    own = load(saved, environ={})  # an EXAMPLE_PATH of today is not the run's
    asked = [*overrides, f"protocol={protocol}"] if protocol else overrides
    settings = load(saved, asked, environ={})
    texts = load_prompts(prompts or settings.prompts)
    data = read_tasks(settings.dataset)
    identity = {"prompt_digest": texts.digest, "tasks_digest": data.digest}
    serving = serve_config_of(settings, settings.judge)
    job = HleJob(settings, data, texts, identity, run_dir.resolve(), serving)
    names = f"{own.judge.model} ({own.protocol})", f"{settings.judge.model} ({job.protocol_label()})"
    return JudgePass(job, label or _label(job, own), own, settings.judge, HleReviewer(job, own), names)


def benchmark_of(run_dir: Path) -> str:
    """The benchmark of the run in `run_dir`. Raises RunDirError where there is none."""
    saved = yaml.safe_load(config_file(run_dir).read_text())
    return str(saved.get("benchmark", "hle")) if isinstance(saved, dict) else "hle"


def config_file(run_dir: Path) -> Path:
    saved = run_dir / "config.yaml"
    if not saved.is_file() or not (run_dir / "log").is_dir():
        raise RunDirError(f"{run_dir}: no config.yaml and log/ there; expected the directory of a run")
    return saved


def serve_config_of(settings: BaseRun, asked: config.Judge) -> ServeConfig:
    """Where the judge is served, if it is a service at all."""
    is_served = any(endpoint.service for endpoint in settings.models[asked.model].endpoints)
    return services.read_serve_config(settings.services if is_served else None)


def judge_settings(settings: BaseRun, asked: config.Judge) -> dict[str, Any]:
    """Of the judge's model, what decides its verdicts."""
    model = settings.models[asked.model]
    return {
        "model": asked.model,
        "served": [model.served_name, model.extra_body],
        "sampling": asked.sampling.model_dump(),
    }


def plan(asked: JudgePass) -> Work:
    """The counted results with both verdicts as the log has them. Raises UserError, StorageError."""
    results = events.results(asked.job.run_dir).to_pylist()
    rows = [row for row in results if row["outcome"] in {"ok", "owed"}]
    subjects = asked.reviewer.subjects(rows)
    tasks = {task.rollout_key: task for task in asked.job.tasks}
    stored = _stored(asked)
    items = []
    for row in rows:
        task = tasks.get(row["rollout_key"])
        if task is None:
            raise DatasetError(asked.reviewer.missing(row["task_id"]))
        if _key(row) in subjects:
            items.append(_item(asked, row, task, subjects[_key(row)], stored))
    order = {task.rollout_key: place for place, task in enumerate(asked.job.tasks)}
    items.sort(key=lambda item: (item.trial, order[item.task.rollout_key]))
    return Work(tuple(items), len(rows) - len(items))


def needs_asking(item: Item, asked: JudgePass) -> bool:
    return asked.reviewer.needs_asking(item.task, item.subject)


def check_overrides(overrides: Sequence[str], changeable: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.partition(".")[0] not in changeable:
            remedy = f"use --{key}" if key in {"protocol", "prompts"} else "the rollouts are not run again"
            raise ConfigError(f"--set {key}: a judge-only pass may set {', '.join(changeable)}; {remedy}")


def sampling_part(asked: config.Judge, own: config.Judge) -> list[str]:
    """What a label says of a judge that is sampled otherwise than the run's own."""
    return [] if asked.sampling == own.sampling else [digest(asked.sampling.model_dump())[:6]]


def _label(job: HleJob, own: RunConfig) -> str:
    settings = job.config
    template = job.prompts.digest_of(TEMPLATES[settings.protocol])
    return ":".join(
        [settings.judge.model, settings.protocol, template, *sampling_part(settings.judge, own.judge)]
    )


@dataclass(frozen=True)
class HleReviewer:
    """Questions by their answers. `own` is the run's config, `job` has the other judge in its own."""

    job: HleJob
    own: RunConfig

    @property
    def settings(self) -> dict[str, Any]:
        settings = self.job.config
        return {
            **judge_settings(settings, settings.judge),
            "protocol": settings.protocol,
            "prompt_digest": self.job.prompts.digest_of(TEMPLATES[settings.protocol]),
        }

    def subjects(self, rows: Sequence[Mapping[str, Any]]) -> dict[Key, Answer]:
        needs_response = self.job.config.protocol == "hle-style"
        found = _answers(self.job.run_dir, rows, needs_response=needs_response)
        return {
            key: answer
            for key, answer in found.items()
            if answer.prediction.strip() or answer.response.strip()
        }

    def request(self, task: Task, subject: Answer) -> str:
        protocol = self.job.config.protocol
        text = judge.prompt(self.job.prompts, task, subject.prediction, subject.response, protocol)
        return digest([self.settings, task.judge_key, text])

    def needs_asking(self, task: Task, subject: Answer) -> bool:
        """The protocol settles equal text, and no answer, without a call."""
        return self._settled(task, subject) is None

    async def verdict(self, caller: Caller, journal: Journal, task: Task, subject: Answer) -> Verdict:
        if (settled := self._settled(task, subject)) is not None:
            return settled
        settings = self.job.config
        verdict = await judge.ask(
            caller,
            journal,
            task,
            subject,
            settings=settings.judge,
            prompts=self.job.prompts,
            protocol=settings.protocol,
        )
        # A rollout under the other protocol was not asked how sure it is: the judge's 100 is no one's.
        return verdict if self.own.protocol == "hle-style" else replace(verdict, confidence=None)

    def missing(self, task_id: str) -> str:
        return (
            f"dataset {self.job.config.dataset.path}: question {task_id!r} of the run is not "
            "in it as it was asked; restore the file, or set dataset.path"
        )

    def _settled(self, task: Task, subject: Answer) -> Verdict | None:
        protocol = self.job.config.protocol
        return judge.without_judge(task, subject.prediction, subject.response, protocol)


def _key(row: Mapping[str, Any]) -> Key:
    return (row["rollout_key"], row["trial"])


def _item(
    asked: JudgePass,
    row: Mapping[str, Any],
    task: Task,
    subject: Any,
    stored: Mapping[tuple[str, int, str], bool],
) -> Item:
    request = asked.reviewer.request(task, subject)
    return Item(
        task,
        row["trial"],
        row["attempt"],
        subject,
        request,
        has_other_reference=row["judge_key"] != task.judge_key,
        first=row["is_correct"] if row["outcome"] == "ok" else None,
        second=stored.get((task.rollout_key, row["trial"], request)),
    )


def _answers(run_dir: Path, rows: Sequence[Mapping[str, Any]], *, needs_response: bool) -> dict[Key, Answer]:
    """What each result answered; whole responses only where the protocol judges them."""
    bodies = events.read_payloads(run_dir, {row["payload_hash"] for row in rows})
    lost = [row["task_id"] for row in rows if row["payload_hash"] not in bodies]
    if lost:
        raise StorageError(f"run {run_dir}: the payload of the result of {lost[0]!r} is not in its log")
    predictions = {_key(row): str(json.loads(bodies[row["payload_hash"]])["prediction"]) for row in rows}
    if not needs_response:
        return {key: Answer(prediction, "") for key, prediction in predictions.items()}
    responses = _responses(run_dir, predictions)
    missing = [row["task_id"] for row in rows if _key(row) not in responses]
    if missing:
        raise ConfigError(
            f"hle-style judges whole responses: {len(missing)} of {len(rows)} results "
            f"(first: {missing[0]!r}) have no `answer` call in the log (adopted ones never have); "
            "use --protocol toolorchestra"
        )
    return {key: Answer(prediction, responses[key]) for key, prediction in predictions.items()}


def _responses(run_dir: Path, predictions: Mapping[Key, str]) -> dict[Key, str]:
    """The newest reply of the `answer` expert from which the counted prediction was read."""
    columns = ["kind", "role", "tool", "status", "rollout_key", "trial", "epoch", "t_start", "payload_hash"]
    rows = [
        row
        for batch in events.read(run_dir, columns)
        for row in batch.to_pylist()
        if (row["kind"], row["role"], row["tool"], row["status"]) == ("model_call", "expert", "answer", "ok")
        and _key(row) in predictions
    ]
    bodies = events.read_payloads(run_dir, {row["payload_hash"] for row in rows})
    found = {}
    for row in sorted(rows, key=lambda row: (row["epoch"], row["t_start"])):
        body = bodies.get(row["payload_hash"])
        if body is None:
            continue  # lost with its process
        reply = str(json.loads(body)["content"])
        if extract.answer(reply) == predictions[_key(row)]:
            found[_key(row)] = extract.without_thinking(reply)
    return found


def _stored(asked: JudgePass) -> dict[tuple[str, int, str], bool]:
    """Verdicts under the label, by (rollout key, trial, request). Refuses a label of another judge."""
    columns = ["kind", "role", "alias", "rollout_key", "trial", "request_hash", "is_correct", "detail"]
    found = {}
    for batch in events.read(asked.job.run_dir, columns):
        for row in batch.to_pylist():
            if (row["kind"], row["role"], row["alias"]) != ("verdict", "judge", asked.label):
                continue
            settings = json.loads(row["detail"])
            if settings != asked.settings:
                differing = [name for name in asked.settings if settings.get(name) != asked.settings[name]]
                raise ConfigError(
                    f"label {asked.label!r}: its verdicts were made with another {', '.join(differing)}; "
                    "restore it, or give another --label"
                )
            found[row["rollout_key"], row["trial"], row["request_hash"]] = row["is_correct"]
    return found
