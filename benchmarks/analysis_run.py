"""A run of any size for `benchmarks.analysis`, made of arrays: its event log, and the same run as a text log.

Latencies are lognormal, tasks run on slots as the engine would run them, rows lie in the files as writers
leave them: one merged file of a run that ended, or the files and streams of one that goes on. The text log is
in the form of the older scripts: one `key=value` line for each orchestrator call, tool call and judge call.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_app.compaction import compact
from ray_app.event_writer import EventWriter
from ray_app.events import EVENT_SCHEMA, SCHEMA_VERSION, event_files
from ray_app.parquet_file import write
from ray_app.records import Event
from ray_app.stream_file import StreamFile
from ray_app.table_files import PARQUET

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

START_S = 1_780_000_000.0
SLOTS, WORKERS = 512, 8
TOOLS = ("search", "enhance_reasoning", "answer", "")
MODELS = {
    "search": ("gpt-5-mini", "gpt-5", "Qwen/Qwen3-32B"),
    "enhance_reasoning": ("Qwen/Qwen2.5-Coder-32B-Instruct", "gpt-5", "gpt-5-mini"),
    "answer": ("gpt-5", "gpt-5-mini", "meta-llama/Llama-3.3-70B-Instruct"),
}
CATEGORIES = (
    "Math",
    "Physics",
    "Chemistry",
    "Biology/Medicine",
    "Computer Science/AI",
    "Humanities",
    "Other",
)
ORCHESTRATOR = "Nemotron-Orchestrator-8B"
INVALID_SHARE = 0.03
STREAM_SHARE, STREAM_ROWS, PARTS = 0.02, 256, 3
DOUBLES = 5000
# By kind of turn (search, reasoning, answer, invalid): events of one.
_EVENTS = (5, 5, 6, 2)


@dataclass(frozen=True)
class Run:
    """The rows of a run, in the order of time within each worker; `worker_rows` counts those of each."""

    table: pa.Table
    worker_rows: tuple[int, ...]
    tasks: int


@dataclass(frozen=True)
class _Turns:
    """One entry a turn, ordered by task: times in seconds, `start_s` since the run's start."""

    task: Ints
    number: Ints
    tool: Ints  # position in TOOLS
    model: Ints
    orchestrator: Floats  # (3, n): queue, prefill, decode
    expert: Floats
    work_s: Floats
    start_s: Floats

    @property
    def asked_s(self) -> Floats:
        return np.asarray(self.start_s + self.orchestrator.sum(0))


def make_run(events: int, tasks: int, seed: int = 1) -> Run:
    """At least `events` rows over `tasks` tasks."""
    chance = np.random.default_rng(seed)
    turns, ends = _turns(chance, events, tasks)
    judge = _latency(chance, tasks, 4.0)
    table = _rows(chance, turns, ends, judge, tasks)
    workers = np.asarray(table["_worker"])
    order = np.lexsort((np.asarray(table["_end"]), workers))
    counts = np.bincount(workers, minlength=WORKERS)
    numbers = np.concatenate([np.arange(count) for count in counts])
    sorted_table = table.take(pa.array(order)).drop_columns(["_worker", "_end"])
    names = [f"e0001-w{worker:03d}" for worker in np.repeat(np.arange(WORKERS), counts)]
    ids = pa.array([f"{name}-{number}" for name, number in zip(names, numbers.tolist(), strict=True)])
    columns = {**{name: sorted_table[name] for name in sorted_table.schema.names}, "event_id": ids}
    columns["worker"] = pa.array(names).dictionary_encode()
    return Run(_conform(columns, len(ids)), tuple(counts.tolist()), tasks)


def write_finished(run: Run, run_dir: Path) -> None:
    """The log of a run that ended and was compacted: one file."""
    _mark(run_dir, run, ["run_start", "run_end"])
    write(_log(run_dir) / f"e0001-worker-000000{PARQUET}", EVENT_SCHEMA, run.table.to_batches())
    compact(run_dir)


def write_live(run: Run, run_dir: Path) -> None:
    """The log of the run as it goes on: each worker's published files and its stream, and rows twice."""
    _mark(run_dir, run, ["run_start"])
    start = 0
    for worker, count in enumerate(run.worker_rows):
        name = f"e0001-w{worker:03d}"
        own, start = run.table.slice(start, count), start + count
        in_stream = int(count * STREAM_SHARE)
        edges = np.linspace(0, count - in_stream, PARTS + 1).astype(int).tolist()
        for part, (low, high) in enumerate(pairwise(edges)):
            path = _log(run_dir) / f"{name}-{part:06d}{PARQUET}"
            write(path, EVENT_SCHEMA, own.slice(low, high - low).to_batches())
        stream = StreamFile(_log(run_dir), name, EVENT_SCHEMA)
        for batch in own.slice(count - in_stream).to_batches(max_chunksize=STREAM_ROWS):
            stream.write(batch)
        stream.retire()
    again = run.table.slice(0, min(DOUBLES, len(run.table)))
    write(_log(run_dir) / f"e0001-checkpoint-000000{PARQUET}", EVENT_SCHEMA, again.to_batches())


def _log(run_dir: Path) -> Path:
    return event_files(run_dir).folder


def _mark(run_dir: Path, run: Run, kinds: Sequence[Any]) -> None:
    facts = {"planned": run.tasks, "benchmark": "hle", "protocol": "hle-style", "judge_model": "gpt-5"}
    writer = EventWriter(run_dir, "e0001-driver")
    last = float(run.table["t_start"].cast(pa.int64()).to_numpy().max()) / 1e6
    at = {"run_start": START_S, "run_end": last + 1}
    for kind in kinds:
        detail = json.dumps(facts) if kind == "run_start" else "ended"
        writer.append(Event(kind, at[kind], run_id="bench", epoch=1, detail=detail))
    writer.close()


def _turns(chance: np.random.Generator, events: int, tasks: int) -> tuple[_Turns, Floats]:
    """The turns, and the seconds since the run's start at which each task ends its rollout."""
    mean_events = (1 - INVALID_SHARE) * 5 + INVALID_SHARE * 2
    n = int(1.002 * (events - 3 * tasks) / mean_events)
    counts = 1 + chance.multinomial(n - tasks, chance.dirichlet(np.full(tasks, 4.0)))
    task = np.repeat(np.arange(tasks), counts)
    last = np.cumsum(counts) - 1
    number = np.arange(n) - np.repeat(last - counts + 1, counts)
    tool = chance.choice([0, 1, 3], n, p=[0.6 - INVALID_SHARE, 0.4, INVALID_SHARE])
    tool[last] = 2
    model = chance.choice(3, n, p=[0.5, 0.3, 0.2])
    orchestrator = np.stack([_latency(chance, n, mean) for mean in (0.2, 0.4, 1.5)])
    expert = np.stack([_latency(chance, n, mean) for mean in (0.5, 1.0, 8.0)]) * (tool != 3)
    work = np.where(tool == 0, _latency(chance, n, 0.3), np.where(tool == 1, _latency(chance, n, 1.0), 0.0))
    whole = orchestrator.sum(0) + expert.sum(0) + work
    before = np.cumsum(whole) - whole
    within = before - np.repeat(before[last - counts + 1], counts)
    spans = np.add.reduceat(whole, last - counts + 1)
    starts = _schedule(spans)
    return (
        _Turns(task, number, tool, model, orchestrator, expert, work, within + starts[task]),
        starts + spans,
    )


def _schedule(spans: Floats) -> Floats:
    """When each task starts: in order, on the slot that is free first."""
    free = [2.0] * min(SLOTS, len(spans))
    starts = []
    for span in spans.tolist():
        starts.append(free[0])
        heapq.heapreplace(free, free[0] + span + 4.0)
    return np.array(starts)


def _latency(chance: np.random.Generator, n: int, mean_s: float, sigma: float = 0.8) -> Floats:
    return np.asarray(mean_s * chance.lognormal(-sigma * sigma / 2, sigma, n))


def _rows(chance: np.random.Generator, turns: _Turns, ends: Floats, judge: Floats, tasks: int) -> pa.Table:
    every, used = np.ones(len(turns.task), bool), turns.tool != 3
    asked, work_at = turns.asked_s, turns.asked_s + turns.expert.sum(0)
    done = work_at + turns.work_s
    search, code = turns.tool == 0, turns.tool == 1
    single = np.arange(tasks)
    right = chance.random(tasks)
    parts = [
        _calls(turns, every, turns.start_s, turns.orchestrator, kind="model_call", role="orchestrator"),
        _calls(turns, used, asked, turns.expert, kind="model_call", role="expert"),
        _part(turns, search, work_at, turns.work_s, kind="retrieval", model=None, cost_usd=0.0, call=2),
        _part(turns, code, work_at, turns.work_s, kind="code", model=None, exit_status=0, call=2),
        _part(turns, used, asked, done - asked, kind="tool_call"),
        _part(turns, every, turns.start_s, done - turns.start_s, kind="turn", status_of=used),
        _tasks(single, ends - ends, kind="attempt", at=_first(turns, tasks)),
        _tasks(single, judge, kind="model_call", role="judge", at=ends, model="gpt-5", tokens=True),
        _tasks(single, judge * 0, kind="verdict", at=ends + judge, right=right),
        _tasks(single, ends + judge - _first(turns, tasks), kind="result", at=ends + judge, right=right),
    ]
    return pa.concat_tables(parts, promote_options="default")


def _first(turns: _Turns, tasks: int) -> Floats:
    return turns.start_s[np.searchsorted(turns.task, np.arange(tasks))]


def _calls(turns: _Turns, mask: NDArray[np.bool_], at: Floats, times: Floats, **columns: Any) -> pa.Table:
    """Model calls, with their stages, tokens and prices."""
    queue, prefill, decode = times[:, mask]
    prompt, completion = np.rint(prefill * 8000) + 200, np.rint(decode * 60) + 20
    is_expert = columns["role"] == "expert"
    more = {
        "queue_s": queue,
        "prefill_s": prefill,
        "decode_s": decode,
        "prompt_tokens": prompt.astype(np.int64),
        "cached_tokens": np.rint(prompt * 0.5).astype(np.int64),
        "completion_tokens": completion.astype(np.int64),
        "cost_usd": (1.25 * prompt + 10 * completion) / 1e6,
        "endpoint": _words(("http://127.0.0.1:8000/v1",), np.zeros(len(queue), int)),
    }
    own = {} if is_expert else {"tool": None, "model": _words((ORCHESTRATOR,), np.zeros(len(queue), int))}
    return _part(turns, mask, at, times.sum(0), call=int(is_expert), **columns, **more, **own)


def _part(
    turns: _Turns,
    mask: NDArray[np.bool_],
    at: Floats,
    duration: Floats,
    *,
    call: int = -1,
    status_of: NDArray[np.bool_] | None = None,
    **columns: Any,
) -> pa.Table:
    n, task, tool = int(mask.sum()), turns.task[mask], turns.tool[mask]
    models = [name for tool_name in TOOLS[:3] for name in MODELS[tool_name]] + [""]
    model = np.where(tool == 3, len(models) - 1, 3 * tool + turns.model[mask])
    own: dict[str, Any] = {
        "turn": turns.number[mask],
        "tool": _words(TOOLS, tool),
        "model": _words(models, model),
        "call_seq": 3 * turns.number[mask] + call if call >= 0 else np.full(n, -1),
        "status": _words(
            ("invalid", "ok"), np.ones(n, int) if status_of is None else status_of[mask].astype(int)
        ),
    }
    own |= {name: _repeated(value, n) for name, value in columns.items() if value is not None}
    own |= {name: _repeated("", n) for name, value in columns.items() if value is None}
    return _table(task, at[mask], duration[mask], own)


def _tasks(
    task: Ints,
    duration: Floats,
    *,
    at: Floats,
    right: Floats | None = None,
    tokens: bool = False,
    **columns: Any,
) -> pa.Table:
    n = len(task)
    own = {name: _repeated(value, n) for name, value in columns.items()}
    if right is not None:
        confidence = np.round(0.2 + 0.8 * right, 2)
        own |= {"is_correct": pa.array(right > 0.65), "confidence": confidence}
        own |= {"verdict_method": _repeated("judge", n)}
    if columns["kind"] == "result":
        own |= {
            "outcome": _words(("ok", "failed", "limited"), (task % 20 == 0).astype(int) + (task % 40 == 0))
        }
        own |= {"cost_usd": 0.001 * duration, "detail": _repeated('{"model_calls": 80}', n)}
    if tokens:
        own |= {"prompt_tokens": np.full(n, 900), "completion_tokens": np.full(n, 120), "decode_s": duration}
        own |= {"cost_usd": np.full(n, 0.0023), "call_seq": np.full(n, 1000)}
    is_result = columns["kind"] == "result"
    return _table(task, at, duration, own, end=at if is_result else None)


def _table(
    task: Ints, at: Floats, duration: Floats, own: dict[str, Any], end: Floats | None = None
) -> pa.Table:
    last = at + duration if end is None else end
    ids = [f"{number:024x}" for number in range(int(task.max(initial=0)) + 1)]
    keys = {
        "task_id": _words(ids, task),
        "rollout_key": _words([f"a1{name}b2c3d4" for name in ids], task),
        "judge_key": _words([f"f9{name}e8d7c6" for name in ids], task),
        "category": _words(CATEGORIES, task % len(CATEGORIES)),
        "answer_type": _words(("exactMatch", "multipleChoice"), (task % 4 == 0).astype(int)),
        "t_start": pa.array(np.rint((START_S + at) * 1e6).astype(np.int64)).cast(
            pa.timestamp("us", tz="UTC")
        ),
        "duration_s": duration,
        "_worker": task % WORKERS,
        "_end": last,
    }
    return pa.table({name: pa.array(value) for name, value in {**keys, **own}.items()})


def _words(words: Sequence[str], codes: Any) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(
        pa.array(np.asarray(codes), pa.int32()), pa.array(words, pa.string())
    )


def _repeated(value: Any, n: int) -> Any:
    if isinstance(value, str):
        return _words((value,), np.zeros(n, int))
    return np.full(n, value) if isinstance(value, int | float) else value


def _conform(columns: dict[str, Any], n: int) -> pa.Table:
    """All columns of the schema; what a row does not say is what `Event` has by default."""
    given: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run_id": "bench",
        "epoch": 1,
        "attempt": 1,
        "trial": 0,
        "retries": 0,
        "is_replayed": False,
        "status": "ok",
    }
    hashed = {"request_hash", "payload_hash"}
    arrays = []
    for field in EVENT_SCHEMA:
        default = given.get(field.name, "" if field.type == pa.string() and not field.nullable else None)
        if field.name in columns:
            column = columns[field.name]
            column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            column = column.cast(field.type)
            arrays.append(column if default is None else column.fill_null(default))
        elif field.name in hashed:
            arrays.append(_hashes(n, len(field.name)))
        elif default is None:
            wanted = -1 if field.name in {"turn", "call_seq"} else None
            arrays.append(
                pa.nulls(n, field.type) if wanted is None else pa.repeat(pa.scalar(wanted, field.type), n)
            )
        else:
            arrays.append(pa.repeat(pa.scalar(default, field.type), n))
    table = pa.table(dict(zip(EVENT_SCHEMA.names, arrays, strict=True)))
    numbers = {name: pa.array(table[name]).fill_null(-1) for name in ("turn", "call_seq")}
    for name, column in numbers.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table.cast(EVENT_SCHEMA)


def _hashes(n: int, seed: int) -> pa.Array:
    """Texts of 32 hex digits."""
    data = np.random.default_rng(seed).bytes(16 * n).hex().encode()
    offsets = np.arange(0, 32 * (n + 1), 32, dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), n, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def write_text_log(run: Run, path: Path) -> int:
    """The run as the older scripts logged it; returns the number of lines."""
    table = run.table
    ends = table["t_start"].cast(pa.int64()).to_numpy() + np.rint(
        table["duration_s"].to_numpy() * 1e6
    ).astype(int)
    kinds, roles = table["kind"].to_pylist(), table["role"].to_pylist()
    rows = [
        place
        for place in np.argsort(ends, kind="stable").tolist()
        if kinds[place] == "tool_call" or (kinds[place] == "model_call" and roles[place] != "expert")
    ]
    taken = table.take(pa.array(rows))
    whole = _inner_ms(table)
    stamps = np.datetime_as_string(ends[rows].astype("datetime64[us]").astype("datetime64[ms]"))
    names = ("kind", "role", "task_id", "turn", "tool", "model", "duration_s", "prefill_s", "decode_s")
    columns = [taken[name].to_pylist() for name in (*names, "prompt_tokens", "completion_tokens")]
    with path.open("w") as file:
        file.write(
            f"[PROFILE] {stamps[0].replace('T', ' ')} task=global thread=1 type=run_start "
            f"model_name={ORCHESTRATOR} concurrency={SLOTS}\n"
        )
        for place, stamp, *row in zip(rows, stamps.tolist(), *columns, strict=True):
            file.write(_line(stamp.replace("T", " "), row, whole.get(place)))
    return len(rows) + 1


def _inner_ms(table: pa.Table) -> dict[int, tuple[float, float]]:
    """For each tool call: milliseconds of its expert and of its retrieval or program."""
    kinds = table["kind"].to_pylist()
    turns, tasks = table["turn"].to_pylist(), table["task_id"].to_pylist()
    spans, roles = table["duration_s"].to_pylist(), table["role"].to_pylist()
    expert = dict[Any, float]()
    work = dict[Any, float]()
    for place, kind in enumerate(kinds):
        if kind == "model_call" and roles[place] == "expert":
            expert[tasks[place], turns[place]] = 1000 * spans[place]
        elif kind in {"retrieval", "code"}:
            work[tasks[place], turns[place]] = 1000 * spans[place]
    return {
        place: (expert.get(key, 0.0), work.get(key, 0.0))
        for place, kind in enumerate(kinds)
        if kind == "tool_call" and (key := (tasks[place], turns[place]))
    }


def _line(stamp: str, row: list[Any], inner: tuple[float, float] | None) -> str:
    kind, role, task, turn, tool, model, duration, prefill, decode, prompt, completion = row
    head = f"{stamp} task={task} thread=140{turn:04d}"
    if role == "judge":
        return f"[USER_JUDGE] {head} type=evaluator model={model} duration_ms={1000 * duration:.2f}\n"
    place = f"step={turn} eid={int(task, 16)}"
    span = f"duration_ms={1000 * duration:.2f}"
    if kind == "model_call":
        infer = 1000 * (prefill + decode)
        return (
            f"[PROFILE] {head} type=llm_call {place} model={model} backend=vllm {span} "
            f"toolorchestra_vllm_infer_ms={infer:.2f} toolorchestra_vllm_prefill_ms={1000 * prefill:.2f} "
            f"toolorchestra_vllm_decode_ms={1000 * decode:.2f} toolorchestra_vllm_prefill_len={prompt} "
            f"toolorchestra_vllm_decode_len={completion}\n"
        )
    expert, work = inner or (0.0, 0.0)
    more = {
        "search": "search_backend=local_only search_local_hits=20 search_tavily_hits=0 "
        f"query_llm_ms={expert:.2f} retrieval_ms={work:.2f} retrieval_retries=0",
        "enhance_reasoning": f"llm_ms={expert:.2f} exec_ms={work:.2f}",
        "answer": f"duration_total_ms={1000 * duration:.2f}",
    }[tool]
    return f"[PROFILE] {head} type=tool_call {place} tool={tool} model={model} {span} {more}\n"
