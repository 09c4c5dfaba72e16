"""Events of this log from the lines and results of earlier systems.

A log's run segments become epochs. What such a run did not write down stays empty: tokens and costs of
experts, whether a program failed. Where its figures mean something else than ours they are translated:
`duration_ms` of an answer is the expert's call alone, its total holds the judge's, who is no part of a tool
call here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from analysis.seed_log import SeedLine
from analysis.seed_results import Results, SeedResult
from ray_app.journal import EventSink
from ray_app.records import Event, Task

PROTOCOL = "toolorchestra"
_VLLM = "toolorchestra_vllm_"


@dataclass
class _Place:
    """Where a task is within a segment: its turn, its judge calls that no answer has claimed yet."""

    started: float
    ended: float
    turn: int = -1
    turn_started: float = 0.0
    has_tool: bool = True
    evaluators: int = 0


@dataclass
class _Start:
    """What the first line of a segment says, and the judges that were at work in it."""

    at: float
    model: str
    concurrency: int | None
    judges: set[str] = field(default_factory=set)


@dataclass
class Converter:
    """Appends the events of a reading to `log`; afterwards `tasks` are those that it knows of."""

    run_id: str
    found: Results
    log: EventSink
    tasks: dict[str, Task] = field(default_factory=dict)
    nameless: int = 0
    events: int = 0
    segments: int = 0
    _starts: list[_Start] = field(default_factory=list)
    _places: dict[str, _Place] = field(default_factory=dict)
    _spent_s: dict[str, float] = field(default_factory=dict)
    _last: dict[str, tuple[float, int]] = field(default_factory=dict)

    def write(self, lines: Iterable[SeedLine], files: Sequence[str]) -> None:
        """Everything that `lines` and the results say. A `run_start` begins a segment, and so does the
        first line where none does."""
        for line in lines:
            if line.kind == "run_start" or not self._starts:
                self._end_segment()
                model, concurrency = line.text("model_name"), line.count("concurrency")
                self._starts.append(_Start(line.at, model, concurrency))
            for row in self._rows(line):
                self._put(row)
        self._end_segment()
        begun = set(self.tasks)
        for result in self.found.by_id.values():
            self._put(self._result(result))
        self.segments = len(self._starts)
        for epoch, start in enumerate(self._starts, 1):
            self._put(self._start(epoch, start, files))
        if self._last and self.found.by_id.keys() >= begun:
            self._put(self._base("run_end", max(at for at, _ in self._last.values())))

    def _put(self, row: Event) -> None:
        self.log.append(row)
        self.events += 1

    @property
    def _epoch(self) -> int:
        return max(1, len(self._starts))

    def _start(self, epoch: int, start: _Start, files: Sequence[str]) -> Event:
        """The facts of a segment, known only at its end: its judges, and how many tasks there are at all."""
        facts = {
            "planned": len(self.tasks),
            "benchmark": "hle",
            "protocol": PROTOCOL,
            "orchestrator": start.model,
            "judge_model": ", ".join(sorted(start.judges)),
            "concurrency": start.concurrency,
            "imported": ", ".join(files),
        }
        known = {name: value for name, value in facts.items() if value not in (None, "")}
        return replace(self._base("run_start", start.at, detail=json.dumps(known)), epoch=epoch)

    def _base(self, kind: Any, t_start: float, **columns: Any) -> Event:
        return Event(kind, t_start, run_id=self.run_id, epoch=self._epoch, **columns)

    def _rows(self, line: SeedLine) -> Iterator[Event]:
        if line.kind == "run_start":
            return
        task_id = line.task or self.found.id_of_eid.get(line.eid, "")
        if not task_id:
            self.nameless += 1
            return
        span = line.seconds("duration_total_ms") or line.seconds("duration_ms") or 0.0
        place = self._places.get(task_id)
        if place is None:
            place = self._places[task_id] = _Place(line.at - span, line.at)
            yield self._of_task(task_id, "attempt", place.started)
        readers = {"llm_call": self._llm_call, "tool_call": self._tool_call, "evaluator": self._evaluator}
        if line.kind in readers:
            yield from readers[line.kind](task_id, place, line)
        place.ended = max(place.ended, line.at)

    def _of_task(self, task_id: str, kind: Any, t_start: float, **columns: Any) -> Event:
        task = self._task(task_id)
        keys = {"rollout_key": task.rollout_key, "judge_key": task.judge_key, "task_id": task_id}
        return self._base(kind, t_start, attempt=self._epoch, **{**keys, **columns})

    def _task(self, task_id: str) -> Task:
        """The task with its keys; without a result its question is not known, and its id stands for it."""
        if task_id not in self.tasks:
            result = self.found.by_id.get(task_id)
            question, answer = (result.question, result.reference) if result else ("", "")
            self.tasks[task_id] = Task(task_id, question, answer)
        return self.tasks[task_id]

    def _llm_call(self, task_id: str, place: _Place, line: SeedLine) -> Iterator[Event]:
        yield from self._end_of_turn(task_id, place)
        duration_s = line.seconds("duration_ms") or 0.0
        place.turn = place.turn + 1 if line.step is None else line.step
        place.turn_started, place.has_tool = line.at - duration_s, False
        has_failed = bool(line.text("error"))
        yield self._of_task(
            task_id,
            "model_call",
            line.at - duration_s,
            duration_s=duration_s,
            turn=place.turn,
            role="orchestrator",
            model=line.text("model"),
            endpoint=line.text("backend"),
            status="error" if has_failed else "ok",
            error_kind="model" if has_failed else None,
            error=line.text("error"),
            prefill_s=line.seconds(f"{_VLLM}prefill_ms"),
            decode_s=line.seconds(f"{_VLLM}decode_ms"),
            prompt_tokens=line.count(f"{_VLLM}prefill_len"),
            completion_tokens=line.count(f"{_VLLM}decode_len"),
        )

    def _evaluator(self, task_id: str, place: _Place, line: SeedLine) -> Iterator[Event]:
        place.evaluators += 1
        self._starts[-1].judges.add(line.text("model"))
        yield self._call(
            task_id,
            place,
            line.at,
            line.seconds("duration_ms") or 0.0,
            role="judge",
            model=line.text("model"),
        )

    def _call(self, task_id: str, place: _Place, ended: float, duration_s: float, **columns: Any) -> Event:
        """A call inside a turn; a model's unless `kind` says otherwise."""
        kind = columns.pop("kind", "model_call")
        return self._of_task(
            task_id, kind, ended - duration_s, duration_s=duration_s, **{"turn": place.turn, **columns}
        )

    def _tool_call(self, task_id: str, place: _Place, line: SeedLine) -> Iterator[Event]:
        tool, model = line.text("tool"), line.text("model")
        if line.step is not None:
            place.turn = line.step
        place.has_tool = True
        whole = {"kind": "tool_call", "tool": tool, "model": model}
        duration_s = line.seconds("duration_ms") or 0.0
        if tool == "answer":
            yield from self._answer(task_id, place, line, whole)
            return
        parts = {"search": self._search_parts, "enhance_reasoning": self._code_parts}
        if tool in parts:
            yield from parts[tool](task_id, place, line)
        hits = {
            "search_backend": line.text("search_backend"),
            "local_hits": line.count("search_local_hits"),
            "web_hits": line.count("search_tavily_hits"),
        }
        yield self._call(task_id, place, line.at, duration_s, **whole, **hits)

    def _search_parts(self, task_id: str, place: _Place, line: SeedLine) -> Iterator[Event]:
        query_s, retrieval_s = line.seconds("query_llm_ms"), line.seconds("retrieval_ms")
        of_tool = {"tool": "search", "model": line.text("model")}
        if query_s is not None:
            yield self._call(
                task_id, place, line.at - (retrieval_s or 0.0), query_s, role="expert", **of_tool
            )
        if retrieval_s is not None:
            yield self._call(
                task_id,
                place,
                line.at,
                retrieval_s,
                kind="retrieval",
                tool="search",
                retries=line.count("retrieval_retries") or 0,
                search_backend=line.text("search_backend"),
                local_hits=line.count("search_local_hits"),
                web_hits=line.count("search_tavily_hits"),
            )

    def _code_parts(self, task_id: str, place: _Place, line: SeedLine) -> Iterator[Event]:
        llm_s, exec_s = line.seconds("llm_ms"), line.seconds("exec_ms")
        of_tool = {"tool": "enhance_reasoning", "model": line.text("model")}
        if llm_s is not None:
            yield self._call(task_id, place, line.at - (exec_s or 0.0), llm_s, role="expert", **of_tool)
        if exec_s is not None:
            yield self._call(task_id, place, line.at, exec_s, kind="code", tool="enhance_reasoning")

    def _answer(
        self, task_id: str, place: _Place, line: SeedLine, whole: Mapping[str, Any]
    ) -> Iterator[Event]:
        """The expert's call, the tool's without the judge; the judge's where no line of its own told it."""
        expert_s, total_s = line.seconds("duration_ms") or 0.0, line.seconds("duration_total_ms")
        judge_s = line.seconds("judge_ms")
        if total_s is None:
            error = "it failed before its expert had answered: only a total was logged"
            failed = {"status": "error", "error_kind": "infrastructure", "error": error}
            yield self._call(task_id, place, line.at, expert_s, **whole, **failed)
            return
        tool_s = max(expert_s, total_s - (judge_s or 0.0))
        began = line.at - max(total_s, tool_s)
        of_tool = {"tool": "answer", "model": line.text("model")}
        yield self._call(task_id, place, began + expert_s, expert_s, role="expert", **of_tool)
        if judge_s is not None and not place.evaluators:
            yield self._call(task_id, place, line.at, judge_s, role="judge")
        place.evaluators = 0
        yield self._call(task_id, place, began + tool_s, tool_s, **whole)

    def _end_of_turn(self, task_id: str, place: _Place) -> Iterator[Event]:
        if place.turn < 0 or place.turn_started == 0.0:
            return
        ended = {"duration_s": max(0.0, place.ended - place.turn_started), "turn": place.turn}
        if place.has_tool:
            yield self._of_task(task_id, "turn", place.turn_started, **ended)
        else:
            error = "no tool call that could be run"
            yield self._of_task(task_id, "turn", place.turn_started, **ended, status="invalid", error=error)
        place.turn_started = 0.0

    def _end_segment(self) -> None:
        for task_id, place in self._places.items():
            # Without a result the last turn may have been cut short, and was not invalid.
            if place.has_tool or task_id in self.found.by_id:
                for row in self._end_of_turn(task_id, place):
                    self._put(row)
            spent = self._spent_s.get(task_id, 0.0)
            self._spent_s[task_id] = spent + place.ended - place.started
            self._last[task_id] = (place.ended, self._epoch)
        self._places = {}

    def _result(self, result: SeedResult) -> Event:
        at, epoch = self._last.get(result.task_id, (result.written, self._epoch))
        body = {
            "prediction": result.prediction or "",
            "verdict": None
            if result.is_correct is None
            else {"is_correct": result.is_correct, "method": result.method, "extracted": result.prediction},
        }
        is_failed = result.outcome == "failed"
        row = self._of_task(
            result.task_id,
            "result",
            at,
            duration_s=self._spent_s.get(result.task_id, 0.0),
            turn=result.turns,
            outcome=result.outcome,
            status="error" if is_failed else "ok",
            error_kind="infrastructure" if is_failed else "limit" if result.outcome == "limited" else None,
            error=result.error,
            is_correct=result.is_correct,
            verdict_method=result.method,
            payload_hash=self.log.payload(json.dumps(body, ensure_ascii=False)),
        )
        return replace(row, epoch=epoch, attempt=epoch)
