"""A run in the forms of other tools: `{id}.json` of earlier systems, tau2's simulations, and flat tables.

An id is never a path: what is not safe in a file name is escaped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from analysis.seed_form import Rows, seed_result
from ray_app import events, journal
from ray_app.errors import ConfigError, RunDirError
from ray_app.records import digest
from ray_app.tau2.counted import counted_simulations

Format = Literal["json", "csv", "parquet", "pandas", "tau2"]
LONGEST_NAME = 120
_GROUP = 200  # results whose payloads are held at once
_CALL_COLUMNS = (
    *("task_id", "rollout_key", "trial", "epoch", "attempt", "turn", "call_seq", "kind", "role", "tool"),
    *("alias", "model", "endpoint", "status", "error_kind", "error", "t_start", "duration_s", "queue_s"),
    *("prefill_s", "decode_s", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_usd", "retries"),
    *("search_backend", "local_hits", "web_hits", "exit_status", "worker", "is_replayed"),
)
_RESULT_COLUMNS = (
    *("task_id", "rollout_key", "judge_key", "trial", "epoch", "attempt", "category", "answer_type"),
    *("outcome", "is_correct", "verdict_method", "confidence", "model", "error_kind", "error", "turn"),
    *("duration_s", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_usd", "t_start"),
)
_STORY_COLUMNS = (*_CALL_COLUMNS, "payload_hash")
CALLS = ("model_call", "tool_call", "retrieval", "code")
Writer = Callable[[Path, Path], list[str]]


def export(run_dir: Path, folder: Path, form: Format) -> list[str]:
    """Write the run into `folder`; the names of the files, or of their kind, with how many.

    Raises ConfigError for a form that this run cannot have, RunDirError where there is no run, or no place.
    """
    writers: Mapping[Format, Writer] = {
        "json": _as_json,
        "csv": _as_csv,
        "parquet": _as_parquet,
        "pandas": _as_feather,
        "tau2": _as_tau2,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return writers[form](run_dir, folder)
    except OSError as error:
        raise RunDirError(f"{folder}: {error.strerror}; expected a writable folder") from None


def _as_tau2(run_dir: Path, folder: Path) -> list[str]:
    """One `DOMAIN/{id}.json` per counted simulation: tau2's SimulationRun."""
    found = sorted(counted_simulations(run_dir).values(), key=lambda each: (each.domain, each.task_id))
    if not found:
        raise ConfigError("export --format tau2: the run has no dialogue that counts; expected a tau2 run")
    for each in found:
        place = folder / quote(each.domain, safe="").replace(".", "%2E")
        place.mkdir(exist_ok=True)
        path = place / file_name(each.task_id.removeprefix(f"{each.domain}:"), each.trial)
        temporary = path.with_name(f".{digest(path.name)}.tmp")
        temporary.write_text(json.dumps(each.run, indent=2, ensure_ascii=False), encoding="utf-8")
        temporary.replace(path)
    return [
        f"{count:,} files {domain}/{{id}}.json" for domain, count in Counter(d.domain for d in found).items()
    ]


def _as_csv(run_dir: Path, folder: Path) -> list[str]:
    from pyarrow import csv

    return _tables(run_dir, folder, ".csv", csv.write_csv)


def _as_parquet(run_dir: Path, folder: Path) -> list[str]:
    from pyarrow import parquet

    return _tables(run_dir, folder, ".parquet", parquet.write_table)


def _as_feather(run_dir: Path, folder: Path) -> list[str]:
    """Feather: what `pandas.read_feather` maps straight into frames, with times as times."""
    from pyarrow import feather

    return _tables(run_dir, folder, ".feather", feather.write_feather)


def _tables(run_dir: Path, folder: Path, suffix: str, write: Callable[[pa.Table, str], None]) -> list[str]:
    """`results`: one row a counted result with its prediction; `calls`: one row a call."""
    found = []
    for name, table in (("results", results_table(run_dir)), ("calls", calls_table(run_dir))):
        temporary = folder / f".{name}{suffix}.tmp"
        write(table, str(temporary))
        temporary.replace(folder / f"{name}{suffix}")
        found.append(f"{name}{suffix}: {len(table):,} rows")
    return found


def results_table(run_dir: Path) -> pa.Table:
    """The counted results with `prediction` and `reasoning` (the judge's), in order of task and trial."""
    table = events.results(run_dir)
    bodies = events.read_payloads(run_dir, {key for key in table["payload_hash"].to_pylist() if key})
    said = [_said(bodies.get(key or "", "")) for key in table["payload_hash"].to_pylist()]
    table = table.select(_RESULT_COLUMNS).rename_columns([_renamed(name) for name in _RESULT_COLUMNS])
    for place, name in enumerate(("prediction", "reasoning")):
        table = table.append_column(name, pa.array([row[place] for row in said], pa.string()))
    return table.sort_by([("task_id", "ascending"), ("trial", "ascending")])


def _renamed(name: str) -> str:
    return {"turn": "turns", "model": "judge_model"}.get(name, name)


def _said(body: str) -> tuple[str, str]:
    """Prediction and the judge's reasoning of a result's payload; empty where they are lost."""
    try:
        value = json.loads(body)
        return str(value["prediction"]), str((value["verdict"] or {}).get("reasoning", ""))
    except (ValueError, KeyError, TypeError):
        return "", ""


def calls_table(run_dir: Path) -> pa.Table:
    """Every call of the run, failed and repeated ones too, in order of time."""
    table = events.columns(run_dir, _CALL_COLUMNS)
    is_opinion = pc.and_(pc.equal(table["role"], "judge"), pc.not_equal(table["alias"], ""))
    is_call = pc.is_in(table["kind"].cast(pa.string()), value_set=pa.array(CALLS))
    calls = table.filter(pc.and_(is_call, pc.invert(is_opinion))).sort_by("t_start")
    for place, field in enumerate(calls.schema):
        if pa.types.is_dictionary(field.type):  # without the words of rows that are no calls
            words = calls.column(place).cast(pa.string()).dictionary_encode()
            calls = calls.set_column(place, field.name, words)
    return calls


def _as_json(run_dir: Path, folder: Path) -> list[str]:
    """One `{id}.json` per counted result; trials after the first as `{id}.trial-N.json`."""
    counted = events.results(run_dir).to_pylist()
    for start in range(0, len(counted), _GROUP):
        group = counted[start : start + _GROUP]
        stories = _stories(run_dir, group)
        for row in group:
            calls = stories.get((row["rollout_key"], row["trial"]), [])
            value = seed_result(row, calls)
            path = folder / file_name(row["task_id"], row["trial"])
            temporary = path.with_name(f".{digest(path.name)}.tmp")
            temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
            temporary.replace(path)
    return [f"{len(counted):,} files {{id}}.json"]


def file_name(task_id: str, trial: int) -> str:
    """A file name for a task's result that no other id has, and that is nothing but a name."""
    safe = quote(task_id, safe=" ").replace(".", "%2E") or "%"
    if len(safe) > LONGEST_NAME:
        safe = f"{safe[:LONGEST_NAME]}~{digest(task_id)[:12]}"
    return f"{safe}.trial-{trial}.json" if trial else f"{safe}.json"


def _stories(run_dir: Path, results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], Rows]:
    """The completed calls of these results, by rollout and trial, with what they gave as `output`."""
    keys = {row["rollout_key"] for row in results}
    rows = events.read(run_dir, _STORY_COLUMNS, where={"rollout_key": keys, "kind": set(CALLS)}).read_all()
    calls = sorted(rows.to_pylist(), key=lambda row: (row["rollout_key"], row["trial"], row["t_start"]))
    bodies = events.read_payloads(run_dir, {row["payload_hash"] for row in calls if row["payload_hash"]})
    named = set[str]().union(*(_named(row, bodies) for row in calls))
    bodies |= events.read_payloads(run_dir, named) if named else {}
    return {
        key: [row | {"output": _output(row, bodies)} for row in group]
        for key, group in groupby(calls, key=lambda row: (row["rollout_key"], row["trial"]))
    }


def _named(row: Mapping[str, Any], bodies: Mapping[str, str]) -> set[str]:
    body = bodies.get(row["payload_hash"] or "")
    return journal.named_texts(body) if row["kind"] == "retrieval" and body else set()


def _output(row: Mapping[str, Any], bodies: Mapping[str, str]) -> Any:
    body = bodies.get(row["payload_hash"] or "")
    if body is None:
        return None
    value = json.loads(body)
    if row["kind"] == "retrieval":
        hits = value["hits"] if isinstance(value, dict) else value
        return [{**hit, "text": bodies.get(hit["text"], "")} for hit in hits]
    return value
