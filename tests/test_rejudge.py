"""Second opinions over a run that the real solver made: what is asked, what is kept, how they compare."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from analysis.agreement import Pair, agreement
from analysis.log import open_run
from analysis.summary import RunSummary, summarise
from jobs.judge import app as judge_app
from ray_app import engine, events, opinions, rejudge, rundir
from ray_app.baseline.server import ServerSettings
from ray_app.chat import ChatRequest
from ray_app.config import RunConfig
from ray_app.errors import ConfigError, InfrastructureError
from ray_app.event_writer import EventWriter
from ray_app.hle import make_solver, read_tasks
from ray_app.journal import Journal
from ray_app.options import Options
from ray_app.prompting import load_prompts
from ray_app.recorded import records
from ray_app.records import ChatReply, Event, Task, TaskResult
from ray_app.tau2 import review
from ray_app.tau2.run import read_tasks as read_dialogues
from ray_app.tau2.service_desk.domain import NAME
from ray_app.tools.base import Caller
from tests.baseline.serving import serving as serving_baseline
from tests.model_server import chunk, serving, usage
from tests.stand_ins import FixedRetriever, MemoryLog, ScriptedModel, chooses, config, says
from tests.tau2 import desk
from tests.tau2.desk import BaselineModel
from tests.tau2.replays import PROMPTS

# id -> (reference, what the rollout answers, what the first judge says; None where it is not asked)
QUESTIONS: Mapping[str, tuple[str, str, bool | None]] = {
    "equal": ("seven", "Seven", None),
    "same": ("1000", "1,000", True),
    "strict": ("heapq.heappop", "heappop", False),
    "lenient": ("KeyError", "IndexError", True),
    "wrong": ("blue", "red", False),
    "silent": ("green", "", None),
}
ANOTHER = ("up", "down", False)
DENIED: tuple[int, dict[str, str], dict[str, str]] = (401, {"message": "no such key"}, {})


def says_verdict(is_correct: bool) -> list[str]:
    return [chunk({"content": f"<correct>{is_correct}</correct>"}, "stop"), usage(1_000_000, 500_000)]


MUMBLES = [chunk({"content": "hard to tell"}, "stop"), usage(1_000_000, 0)]


def run_config(folder: Path, more: int = 0) -> RunConfig:
    """The questions above, and `more` of one kind, over one model."""
    answers = {name: answer for name, (answer, _, _) in QUESTIONS.items()}
    answers |= {f"more{number}": ANOTHER[0] for number in range(more)}
    lines = [
        json.dumps({"id": name, "question": f"What is {name}?", "answer": answer})
        for name, answer in answers.items()
    ]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    dataset = {"path": str(folder / "questions.jsonl"), "policy": "unscoped"}
    return config(dataset=dataset, concurrency=1)


def script(request: ChatRequest) -> ChatReply:
    """The rollout's models and the first judge, in one."""
    text = request.messages[-1].content
    name = re.findall(r"What is (\w+)\?", text)[-1]
    _, answer, verdict = QUESTIONS.get(name, ANOTHER)
    if request.tools:
        return chooses("answer", "answer-1")
    if "Reference answer" in text:
        return says(f"<correct>{verdict}</correct>")
    return says(f"I took some steps to {name}. <answer>{answer}</answer>")


async def make_run(folder: Path, more: int = 0) -> Path:
    """A run directory as a finished run of the real solver leaves it."""
    values = run_config(folder, more)
    tasks, prompts, run_dir = read_tasks(values.dataset), load_prompts(), folder / "run"
    identity = {"prompt_digest": prompts.digest, "tasks_digest": tasks.digest}
    rundir.open_run(run_dir, values, identity)
    log = EventWriter(run_dir, "e0001-w000-test")
    facts = json.dumps({"planned": len(tasks.tasks), "judge_model": "m"})
    log.append(Event("run_start", 1.0, epoch=1, detail=facts))
    solver = make_solver(values, prompts, ScriptedModel(script), FixedRetriever([]), None)
    for task in tasks.tasks:
        journal = Journal(task, log, base(task))
        solved = await solver.solve(task, journal)
        result = TaskResult(task.task_id, task.rollout_key, task.judge_key, 0, 1, "ok")
        await commit(log, run_dir, result, prediction=solved.prediction, verdict=solved.verdict)
    log.append(Event("run_end", 2.0, epoch=1))
    log.close()
    return run_dir


def base(task: Task) -> Event:
    return Event(
        "attempt",
        0.0,
        epoch=1,
        rollout_key=task.rollout_key,
        judge_key=task.judge_key,
        task_id=task.task_id,
        attempt=1,
    )


async def commit(log: EventWriter, run_dir: Path, result: TaskResult, epoch: int = 1, **fields: Any) -> None:
    options = Options(run_dir, "run", epoch, 1, 1, 1)
    log.append(engine.result_event(replace(result, **fields), options, log))


def asked(run_dir: Path, url: str, *overrides: str, **options: Any) -> opinions.JudgePass:
    """A pass with a judge `other` that answers at `url`, at two dollars a million tokens."""
    model = json.dumps(
        {"endpoints": [{"base_url": url}], "served_name": "m", "price": {"input": 2, "output": 2}}
    )
    chosen = [f"models.other={model}", "judge.model=other", *overrides]
    return opinions.read_pass(run_dir, chosen, **options)


async def carry_out(job: opinions.JudgePass, said: list[str] | None = None) -> rejudge.Tally:
    """In a thread of its own: a job owns its event loop."""
    say = (said if said is not None else list[str]()).append
    return await asyncio.to_thread(rejudge.carry_out, job, say)


def rows(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in events.read(run_dir).read_all().to_pylist() if row["kind"] == kind]


def figures(run_dir: Path) -> RunSummary:
    return summarise(open_run(run_dir))


async def test_each_answer_gets_a_second_verdict_beside_the_first_and_no_rollout_runs(tmp_path: Path) -> None:
    run_dir = await make_run(tmp_path)
    results, summary = events.results(run_dir), figures(run_dir)
    verdicts = [says_verdict(item) for item in (True, True, False, False)]
    async with serving(*verdicts) as server:
        job = asked(run_dir, server.url)
        tally = await carry_out(job)
    assert (tally.judged, tally.exit_code) == (5, 0)
    questions = [request["messages"][0]["content"] for request in server.requests]
    assert [re.findall(r"What is (\w+)\?", text) for text in questions] == [
        ["same"],
        ["strict"],
        ["lenient"],
        ["wrong"],
    ]
    assert all("Reference answer" in text for text in questions)
    assert not any("tools" in request for request in server.requests)
    assert events.results(run_dir).equals(results) and figures(run_dir) == summary
    work = opinions.plan(job)
    assert {item.task.task_id: (item.first, item.second) for item in work.items} == {
        "equal": (True, True),
        "same": (True, True),
        "strict": (False, True),
        "lenient": (True, False),
        "wrong": (False, False),
    }
    assert work.skipped == 1


async def test_what_a_verdict_says_and_costs_is_in_the_log_under_the_label(tmp_path: Path) -> None:
    run_dir = await make_run(tmp_path)
    async with serving(says_verdict(True)) as server:
        job = asked(run_dir, server.url)
        assert rejudge.expected_cost(job, 10) == pytest.approx(10 * 110 * 2 / 1e6)
        tally = await carry_out(job)
    digest = load_prompts().digest_of("judge_toolorchestra")
    assert job.label == f"other:toolorchestra:{digest}"
    stored = [row for row in rows(run_dir, "verdict") if row["alias"] == job.label]
    assert [row["verdict_method"] for row in stored] == ["exact", *["judge"] * 4]
    bodies = events.read_payloads(run_dir, {row["payload_hash"] for row in stored})
    said = json.loads(bodies[stored[1]["payload_hash"]])
    assert (said["extracted"], said["judge_model"], said["is_correct"]) == ("1,000", "other", True)
    calls = [row for row in rows(run_dir, "model_call") if row["alias"] == job.label]
    assert [(row["role"], row["status"], row["epoch"]) for row in calls] == [("judge", "ok", tally.epoch)] * 4
    assert rejudge.spent(job, tally.epoch) == rejudge.Spent(4, 12.0, 4, 12.0)


async def test_a_pass_that_is_run_again_asks_only_for_what_is_owed(tmp_path: Path) -> None:
    run_dir = await make_run(tmp_path)
    async with serving(says_verdict(True), MUMBLES, says_verdict(True)) as server:
        job = asked(run_dir, server.url)
        first = await carry_out(job)
        assert (first.judged, first.owed, first.exit_code) == (4, 1, 3)
        assert [item.task.task_id for item in opinions.plan(job).left] == ["strict"]
        second = await carry_out(job)
        third = await carry_out(job)
    assert (second.planned, second.judged, second.exit_code) == (1, 1, 0)
    assert (third.planned, len(server.requests)) == (0, 5)
    assert rejudge.spent(job, second.epoch).calls_total == 5


async def test_an_endpoint_that_refuses_leaves_the_verdict_for_the_next_pass(tmp_path: Path) -> None:
    run_dir = await make_run(tmp_path)
    async with serving(says_verdict(True), DENIED, says_verdict(True)) as server:
        job = asked(run_dir, server.url)
        tally = await carry_out(job)
    assert (tally.judged, tally.failed, tally.exit_code) == (4, 1, 1)
    assert "HTTP 401" in tally.last_error
    assert [item.task.task_id for item in opinions.plan(job).left] == ["strict"]


async def test_a_pass_that_waits_for_its_endpoint_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, said = await make_run(tmp_path), list[str]()
    monkeypatch.setattr(rejudge, "LINE_EVERY_S", 0.02)
    async with serving(says_verdict(True), (503, {"message": "full up"}, {}), says_verdict(True)) as server:
        assert (await carry_out(asked(run_dir, server.url), said)).judged == 5
    waited = [line for line in said if f"1 calls wait for {server.url}: " in line]
    assert waited and waited[0].startswith("5 to judge = ") and waited[0].endswith("full up")


async def test_a_pass_in_which_only_failures_come_back_stops(tmp_path: Path) -> None:
    run_dir = await make_run(tmp_path, more=25)
    async with serving(says_verdict(True), DENIED) as server:
        job = asked(run_dir, server.url)
        with pytest.raises(InfrastructureError, match="20 judge calls in a row failed"):
            await carry_out(job)
    assert len(server.requests) == 21
    assert len(opinions.plan(job).left) == 28


async def test_an_answer_that_came_since_is_judged_again(tmp_path: Path) -> None:
    run_dir = await make_run(tmp_path)
    async with serving(says_verdict(False)) as server:
        job = asked(run_dir, server.url)
        await carry_out(job)
        task = job.job.tasks_by_id["strict"]
        log = EventWriter(run_dir, "e0009-driver-test")
        result = TaskResult(task.task_id, task.rollout_key, task.judge_key, 0, 2, "ok", "heapq's heappop")
        await commit(log, run_dir, result, epoch=9)
        log.close()
        assert [item.task.task_id for item in opinions.plan(job).left] == ["strict"]


async def test_a_corrected_reference_is_judged_again_and_said(tmp_path: Path) -> None:
    run_dir = await make_run(tmp_path)
    async with serving(says_verdict(False)) as server:
        await carry_out(asked(run_dir, server.url))
        questions = tmp_path / "questions.jsonl"
        questions.write_text(questions.read_text().replace('"blue"', '"crimson"'))
        left = opinions.plan(asked(run_dir, server.url)).left
    assert [(item.task.answer, item.has_other_reference) for item in left] == [("crimson", True)]


async def test_hle_style_judges_the_whole_response_from_the_log(tmp_path: Path) -> None:
    run_dir = await make_run(tmp_path)
    with serving_baseline(ServerSettings(models=("m",))) as url:
        job = asked(run_dir, f"{url}/v1", protocol="hle-style")
        tally = await carry_out(job)
    assert (tally.judged, tally.owed, tally.failed) == (6, 0, 0)
    items = {item.task.task_id: item for item in opinions.plan(job).items}
    assert items["strict"].subject.response == "I took some steps to strict. <answer>heappop</answer>"
    assert {name: item.second for name, item in items.items()} == {
        "equal": True,
        "same": True,
        "strict": True,
        "lenient": False,
        "wrong": False,
        "silent": False,
    }
    stored = [row for row in rows(run_dir, "verdict") if row["alias"] == job.label]
    bodies = events.read_payloads(run_dir, {row["payload_hash"] for row in stored})
    said = {row["task_id"]: json.loads(bodies[row["payload_hash"]]) for row in stored}
    assert said["strict"]["extracted"] == "heappop" and said["strict"]["reasoning"]
    assert all(row["confidence"] is None for row in stored)  # these rollouts were not asked for any


async def test_a_label_keeps_to_one_judge(tmp_path: Path) -> None:
    run_dir = await make_run(tmp_path)
    async with serving(says_verdict(True)) as server:
        await carry_out(asked(run_dir, server.url, label="mine"))
        warmer = "judge.sampling.temperature=0.5"
        with pytest.raises(ConfigError, match="'mine': its verdicts were made with another sampling"):
            opinions.plan(asked(run_dir, server.url, warmer, label="mine"))
        other = asked(run_dir, server.url, warmer)
    assert other.label != asked(run_dir, server.url).label
    assert len(opinions.plan(other).left) == 5


async def test_a_resumed_run_goes_on_after_a_pass_as_if_there_was_none(tmp_path: Path) -> None:
    run_dir = await make_run(tmp_path)
    task = read_tasks(run_config(tmp_path).dataset).tasks[1]
    before = records(run_dir, {(task.rollout_key, 0)})[task.rollout_key, 0]
    async with serving(says_verdict(True)) as server:
        await carry_out(asked(run_dir, server.url))
    after = records(run_dir, {(task.rollout_key, 0)})[task.rollout_key, 0]
    model, log = ScriptedModel(script), EventWriter(tmp_path / "elsewhere", "w")
    journal = Journal(task, log, base(task), after)
    solver = make_solver(run_config(tmp_path), load_prompts(), model, FixedRetriever([]), None)
    solved = await solver.solve(task, journal)
    log.close()
    assert (len(model.asked), journal.replayed) == (0, len(before.calls))
    assert solved.verdict is not None and solved.verdict.judge_model == "m"


def test_sigterm_ends_a_pass_at_once_with_what_was_stored(tmp_path: Path) -> None:
    run_dir = asyncio.run(make_run(tmp_path))
    urls: list[str] = []
    is_up = threading.Event()

    async def serve() -> None:
        async with serving(says_verdict(True), "hang") as server:
            urls.append(server.url)
            is_up.set()
            while len(server.requests) < 2:
                server.arrived.clear()
                await server.arrived.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            await server.closed_early.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert is_up.wait(30)
    job = asked(run_dir, urls[0])
    tally = rejudge.carry_out(job, lambda line: None)
    thread.join()
    assert (tally.judged, tally.exit_code) == (2, 128 + signal.SIGTERM)
    assert [item.task.task_id for item in opinions.plan(job).left] == ["strict", "lenient", "wrong"]


async def test_simulations_are_rewarded_again_from_their_record_owed_ones_too(tmp_path: Path) -> None:
    run_dir = await make_dialogues(tmp_path)
    job = review.read_pass(run_dir)
    tally = await carry_out(job)
    assert (tally.judged, tally.owed, tally.failed) == (3, 0, 0)
    found = {item.task.task_id.partition(":")[2]: item for item in opinions.plan(job).items}
    first = {"unlock_password": None, "vpn_start": True, "licence_seats": False}
    assert {name: item.first for name, item in found.items()} == first
    assert {name: item.second for name, item in found.items()} == first | {"unlock_password": True}
    # The record decides, not the first verdict; nothing of the run itself is another now.
    page = CliRunner().invoke(judge_app, [str(run_dir), "--plan"])
    assert "0 to judge (0 of them need no call), 3 stored" in page.output
    assert [row["outcome"] for row in events.results(run_dir).to_pylist()].count("owed") == 1
    # Where a statement counts, the judge of now is asked about the dialogue as it was.
    denying = BaselineModel(lambda request: ChatReply('{"1": false}'))
    journal = Journal(desk.task("unlock_password"), MemoryLog(), base(desk.task("unlock_password")))
    judged = desk.task("unlock_password", evaluation_criteria=JUDGED)
    caller = Caller(denying, desk.config().models)
    verdict = await job.reviewer.verdict(caller, journal, judged, found["unlock_password"].subject)
    assert (verdict.is_correct, verdict.judge_model, len(denying.asked)) == (False, "m", 1)
    assert "unlock_account" in denying.asked[0].messages[0].content


JUDGED = desk.RAW["unlock_password"]["evaluation_criteria"] | {
    "nl_assertions": ["The agent says what it has done."],
    "reward_basis": ["DB", "NL_ASSERTION"],
}


async def make_dialogues(folder: Path) -> Path:
    """A tau2 run of three tasks as it was left: one owed by its judge, one right, one wrong."""
    settings, run_dir = desk.config(), folder / "run"
    data = read_dialogues(settings, {NAME: desk.DESK})
    identity = {"prompt_digest": PROMPTS.digest, "tasks_digest": data.digest}
    rundir.open_run(run_dir, settings, identity)
    log = EventWriter(run_dir, "e0001-w000-test")
    log.append(Event("run_start", 1.0, epoch=1, detail=json.dumps({"planned": 3})))
    models = {
        # The criteria of then asked a judge, which could not be read.
        desk.task("unlock_password", evaluation_criteria=JUDGED): BaselineModel(),
        desk.task("vpn_start"): BaselineModel(),
        desk.task("licence_seats"): BaselineModel(lambda request: ChatReply("###STOP###")),
    }
    for task, model in models.items():
        solved = await desk.solver(model).solve(task, Journal(task, log, base(task)))
        result = TaskResult(task.task_id, task.rollout_key, task.judge_key, 0, 1, "ok", category=NAME)
        ended = "ok" if solved.verdict else "owed"
        await commit(log, run_dir, result, outcome=ended, prediction="user_stop", verdict=solved.verdict)
    log.close()
    return run_dir


def pairs(both_right: int, only_first: int, only_second: int, both_wrong: int) -> list[Pair]:
    counts = {
        (True, True): both_right,
        (True, False): only_first,
        (False, True): only_second,
        (False, False): both_wrong,
    }
    return [Pair(f"q{n}", *verdicts) for verdicts, count in counts.items() for n in range(count)]


def test_kappa_is_the_agreement_beyond_chance() -> None:
    # By hand: 35 of 50 agree, 0.7; by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5; (0.7 - 0.5) / (1 - 0.5) = 0.4.
    found = agreement(pairs(20, 5, 10, 15))
    assert (found.n, found.first_correct, found.second_correct, found.share) == (50, 25, 30, 0.7)
    assert found.kappa == pytest.approx(0.4)
    assert (len(found.to_right), len(found.to_wrong)) == (10, 5)


def test_kappa_has_its_ends_and_no_value_where_chance_agrees_on_all() -> None:
    assert agreement(pairs(3, 0, 0, 2)).kappa == pytest.approx(1.0)
    assert agreement(pairs(0, 2, 2, 0)).kappa == pytest.approx(-1.0)
    assert agreement(pairs(5, 0, 0, 0)).kappa is None
    assert agreement([]).kappa is None and agreement([]).share is None
