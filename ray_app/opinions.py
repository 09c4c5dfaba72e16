"""Second opinions: which counted results of a run another judge is to judge, and what it has said so far.

A second opinion is a `verdict` row of role `judge` in the run's log, whose `alias` is its label and
whose `detail` says with what it was made. Result rows are only read: the run's score stays what it was.
Here nothing is asked and nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_app import events, extract, judge, services
from ray_app.config import RunConfig, load
from ray_app.errors import ConfigError, DatasetError, RunDirError, StorageError
from ray_app.hle import HleJob, read_tasks
from ray_app.prompting import load_prompts
from ray_app.records import Task, Verdict, digest
from ray_app.tools.base import Answer

# What another judge may differ in; the rest of the config says what the run was.
CHANGEABLE = ("judge", "models", "concurrency", "services", "endpoints_file", "dataset")
TEMPLATES: dict[judge.Protocol, str] = {
    "toolorchestra": "judge_toolorchestra",
    "hle-style": "judge_hle",
}
Key = tuple[str, int]


@dataclass(frozen=True)
class JudgePass:
    """Another judge for a run, read and checked. `job` is the run's with that judge in its config."""

    job: HleJob
    label: str
    own: RunConfig

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a verdict, beside the question and its answer."""
        config = self.job.config
        model = config.models[config.judge.model]
        return {
            "model": config.judge.model,
            "served": [model.served_name, model.extra_body],
            "sampling": config.judge.sampling.model_dump(),
            "protocol": config.protocol,
            "prompt_digest": self.job.prompts.digest_of(TEMPLATES[config.protocol]),
        }


@dataclass(frozen=True, slots=True)
class Item:
    """One result to judge, with its first and its stored second verdict; None where there is none.

    `request` is the digest of all that decides the second one. `has_other_reference`: the first was
    given against a reference answer that the dataset has no more.
    """

    task: Task
    trial: int
    attempt: int
    answer: Answer
    request: str
    has_other_reference: bool
    first: bool | None = None
    second: bool | None = None


@dataclass(frozen=True)
class Work:
    """Every counted result with something to judge; `skipped` counts those without an answer."""

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
    saved = run_dir / "config.yaml"
    if not saved.is_file() or not (run_dir / "log").is_dir():
        raise RunDirError(f"{run_dir}: no config.yaml and log/ there; expected the directory of a run")
    _check_overrides(overrides)
    own = load(saved, environ={})  # an EXAMPLE_PATH of today is not the run's
    asked = [*overrides, f"protocol={protocol}"] if protocol else overrides
    config = load(saved, asked, environ={})
    texts = load_prompts(prompts or config.prompts)
    endpoints = config.models[config.judge.model].endpoints
    is_served = any(endpoint.service for endpoint in endpoints)
    serve_config = services.read_serve_config(config.services if is_served else None)
    data = read_tasks(config.dataset)
    identity = {"prompt_digest": texts.digest, "tasks_digest": data.digest}
    job = HleJob(config, data, texts, identity, run_dir.resolve(), serve_config)
    return JudgePass(job, label or _label(job, own), own)


def plan(asked: JudgePass) -> Work:
    """The counted results with both verdicts as the log has them. Raises UserError, StorageError."""
    run_dir, protocol = asked.job.run_dir, asked.job.config.protocol
    rows = [row for row in events.results(run_dir).to_pylist() if row["outcome"] in {"ok", "owed"}]
    answers = _answers(run_dir, rows, needs_response=protocol == "hle-style")
    tasks = {task.rollout_key: task for task in asked.job.tasks}
    stored = _stored(asked)
    items = []
    for row in rows:
        task, answer = tasks.get(row["rollout_key"]), answers[_key(row)]
        if task is None:
            raise DatasetError(
                f"dataset {asked.job.config.dataset.path}: question {row['task_id']!r} of the run is not "
                "in it as it was asked; restore the file, or set dataset.path"
            )
        if answer.prediction.strip() or answer.response.strip():
            items.append(_item(asked, row, task, answer, stored))
    order = {task.rollout_key: place for place, task in enumerate(asked.job.tasks)}
    items.sort(key=lambda item: (item.trial, order[item.task.rollout_key]))
    return Work(tuple(items), len(rows) - len(items))


def needs_asking(item: Item, asked: JudgePass) -> bool:
    """Whether the verdict takes a call: the protocol settles equal text, and no answer, without one."""
    return settled(item, asked) is None


def settled(item: Item, asked: JudgePass) -> Verdict | None:
    """The verdict that the protocol gives without asking, or None."""
    protocol = asked.job.config.protocol
    return judge.without_judge(item.task, item.answer.prediction, item.answer.response, protocol)


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.partition(".")[0] not in CHANGEABLE:
            remedy = f"use --{key}" if key in {"protocol", "prompts"} else "the rollouts are not run again"
            raise ConfigError(f"--set {key}: a judge-only pass may set {', '.join(CHANGEABLE)}; {remedy}")


def _label(job: HleJob, own: RunConfig) -> str:
    config = job.config
    parts = [config.judge.model, config.protocol, job.prompts.digest_of(TEMPLATES[config.protocol])]
    if config.judge.sampling != own.judge.sampling:
        parts.append(digest(config.judge.sampling.model_dump())[:6])
    return ":".join(parts)


def _key(row: Mapping[str, Any]) -> Key:
    return (row["rollout_key"], row["trial"])


def _item(
    asked: JudgePass,
    row: Mapping[str, Any],
    task: Task,
    answer: Answer,
    stored: Mapping[tuple[str, int, str], bool],
) -> Item:
    text = judge.prompt(
        asked.job.prompts, task, answer.prediction, answer.response, asked.job.config.protocol
    )
    request = digest([asked.settings, task.judge_key, text])
    return Item(
        task,
        row["trial"],
        row["attempt"],
        answer,
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
