"""How long things take: per tool, model and stage of a call, described and binned.

Times are of calls that succeeded, in seconds, of the segment that is asked for. A tool call spans all that it
does, its expert included; a model call spans its wait for a place (queue), the time to the first token
(prefill), the rest of the answer (decode) and our own overhead. A retrieval that asked the web counts as web.
Among the stages, `user` is the simulated user's model and `environment` a tool of a dialogue's environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from analysis.log import STAGES, Floats, Ints, Mask, RunLog, counts, said, split, sums
from analysis.numbers import Histogram, Summary, describe, linear_histogram, log_histogram, ordered

Group = Literal["tool", "model", "stage", "orchestrator", "tokens"]
Unit = Literal["s", "tokens"]

TOOLS = ("enhance_reasoning", "search", "answer")
GROUPS: dict[Group, str] = {
    "tool": "Tool calls",
    "model": "Model calls, by model",
    "stage": "Stages of all calls",
    "orchestrator": "Orchestrator calls, by stage",
    "tokens": "Tokens of an orchestrator call",
}
ALL = "all tools"
PARTS = ("queue", "prefill", "decode", "retrieval", "web", "code", "other")
COLUMNS = (*STAGES, "prompt_tokens", "completion_tokens", "call_seq")
MODEL_STAGES = ("orchestrator", "expert", "user", "judge")
BINS = 10


class Series(NamedTuple):
    """One quantity: its values, which `series` sorts; `errors` are calls that ended badly, not among them."""

    group: Group
    name: str
    unit: Unit
    values: Floats
    errors: int = 0


@dataclass(frozen=True, slots=True)
class TimingRow:
    """A series described; the histograms are None where there is nothing to show."""

    group: Group
    name: str
    unit: Unit
    errors: int
    stats: Summary
    hist_linear: Histogram | None
    hist_log: Histogram | None

    @property
    def title(self) -> str:
        prefix = {"tool": "Tool ", "model": "Model ", "orchestrator": "Orchestrator "}.get(self.group, "")
        return f"{prefix if self.name != ALL else ''}{self.name}"


@dataclass(frozen=True, slots=True)
class Components:
    """Where the mean second of a kind of call goes: seconds by part, adding up to `mean_s`."""

    name: str
    calls: int
    mean_s: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Timing:
    """What `python -m analysis timing` prints; `note` is why there is nothing, where there is nothing."""

    run: str
    note: str
    series: list[Series]
    rows: list[TimingRow]
    components: list[Components]

    @property
    def content(self) -> dict[str, Any]:
        """For JSON: everything but the values themselves."""
        return {
            "run": self.run,
            "note": self.note,
            "rows": [asdict(row) for row in self.rows],
            "components": [asdict(row) for row in self.components],
        }

    def row(self, group: Group, name: str) -> TimingRow:
        """The row of this name; an empty one where the run has none."""
        found = (row for row in self.rows if (row.group, row.name) == (group, name))
        unit: Unit = "tokens" if group == "tokens" else "s"
        return next(found, TimingRow(group, name, unit, 0, describe([]), None, None))


def timing(log: RunLog) -> Timing:
    """All series of the run, described."""
    found = list(series(log)) if log.absence is None else []
    note = "" if found else (log.absence or log.no("call"))
    return Timing(log.name, note, found, [described(one) for one in found], components(log) if found else [])


def series(log: RunLog) -> Iterator[Series]:
    """Every quantity that has a value or an error, group by group."""
    for one in quantities(log):
        yield one._replace(values=ordered(one.values))


def quantities(log: RunLog) -> Iterator[Series]:
    """What `series` gives, as it lies in the log: unsorted."""
    tools, models = log.words("tool"), log.words("model")
    is_tool, is_model = log.kind("tool_call"), log.kind("model_call")
    failures = log.calls & log.is_error
    rows = np.flatnonzero(log.timed & is_tool)
    by_tool = split(tools, rows, log.at("duration_s", rows))
    failed = counts(tools, failures & is_tool)
    yield from _if_any("tool", ALL, np.concatenate([*by_tool.values(), np.empty(0)]), sum(failed.values()))
    for name in sorted({*by_tool, *failed}, key=place):
        yield from _if_any("tool", name, by_tool.get(name, np.empty(0)), failed.get(name, 0))
    masks = stage_masks(log)
    # The orchestrator's calls first, so that its times are the head of all.
    own = np.flatnonzero(log.timed & masks["orchestrator"])
    rows = np.concatenate([own, np.flatnonzero(log.timed & is_model & ~masks["orchestrator"])])
    duration = log.at("duration_s", rows)
    by_model = split(models, rows, duration)
    failed = counts(models, failures & is_model)
    for name in dict.fromkeys([*by_model, *failed]):
        yield from _if_any("model", name or "(unknown)", by_model.get(name, np.empty(0)), failed.get(name, 0))
    spent = {name: log.at(f"{name}_s", rows) for name in PARTS[:3]}
    for name, values in spent.items():
        yield from _if_any("stage", name, said(values))
    for name, mask in masks.items():
        found = duration[: len(own)] if name == "orchestrator" else log.at("duration_s", log.timed & mask)
        yield from _if_any("stage", name, said(found), int((failures & mask).sum()))
    yield from _orchestrator(log, own, {name: values[: len(own)] for name, values in spent.items()})


def stage_masks(log: RunLog) -> dict[str, Mask]:
    """The rows of each stage whose time is that of a whole call; none belongs to two of them."""
    retrieval, web = log.kind("retrieval"), log.words("search_backend").is_in("tavily_fallback")
    # An environment's tool is a call of its own, with a place in the record; other tools only span calls.
    own_tool = log.kind("tool_call") & (log.ints("call_seq") >= 0)
    return {
        **{role: log.role(role) for role in MODEL_STAGES},
        "environment": own_tool,
        "retrieval": retrieval & ~web,
        "web": retrieval & web,
        "code": log.kind("code"),
    }


def _orchestrator(log: RunLog, rows: Ints, spent: dict[str, Floats]) -> Iterator[Series]:
    """Of its calls in `rows`, with their seconds by part; NaN where a call does not say one."""
    for name, values in spent.items():
        yield from _if_any("orchestrator", name, said(values))
    # Prefill plus decode is the model's own time, without the wait for a place at the endpoint.
    yield from _if_any("orchestrator", "inference", said(spent["prefill"] + spent["decode"]))
    prompt, completion = (log.at(f"{name}_tokens", rows) for name in ("prompt", "completion"))
    for name, values in {
        "prompt": prompt,
        "completion": completion,
        "prompt + completion": prompt + completion,
    }.items():
        yield from _if_any("tokens", name, said(values))


def _if_any(group: Group, name: str, values: Floats, errors: int = 0) -> Iterator[Series]:
    if len(values) or errors:
        yield series_of(group, name, values, errors)


def series_of(group: Group, name: str, values: Floats, errors: int = 0) -> Series:
    """A series of these values, in seconds or tokens."""
    return Series(group, name, "tokens" if group == "tokens" else "s", values, errors)


def described(one: Series) -> TimingRow:
    """Moments, percentiles and histograms of a series."""
    stats = describe(one.values, five_seconds=5.0 if one.unit == "s" else None)
    histograms = linear_histogram(one.values, BINS), log_histogram(one.values, BINS)
    return TimingRow(one.group, one.name, one.unit, one.errors, stats, *histograms)


def components(log: RunLog) -> list[Components]:
    """The mean call of each tool, of the orchestrator and of the judge, by part."""
    tools, size = log.words("tool"), len(log.words("tool").names)
    masks, timed, duration = stage_masks(log), log.timed, log.numbers("duration_s")
    spent = {
        **{part: (masks["expert"], log.numbers(f"{part}_s")) for part in PARTS[:3]},
        **{part: (masks[part], duration) for part in ("retrieval", "web", "code")},
    }
    parts = {
        name: _by_code(tools.codes, values, timed & mask, size) for name, (mask, values) in spent.items()
    }
    is_call = timed & log.kind("tool_call")
    n, whole = (
        np.bincount(tools.codes[is_call], minlength=size),
        _by_code(tools.codes, duration, is_call, size),
    )
    found = [
        _components(name, int(n[code]), whole[code], {part: parts[part][code] for part in parts})
        for code, name in enumerate(tools.names)
        if n[code]
    ]
    found.sort(key=lambda row: place(row.name))
    for role in ("orchestrator", "user", "judge"):
        mask = timed & masks[role]
        if calls := int(mask.sum()):
            own = {part: float(np.nansum(log.numbers(f"{part}_s")[mask])) for part in PARTS[:3]}
            found.append(_components(role, calls, float(duration[mask].sum()), own))
    return found


def _by_code(codes: Any, values: Floats, mask: Mask, size: int) -> Floats:
    return sums(codes[mask], values[mask], size)


def _components(name: str, calls: int, total_s: float, parts: dict[str, float]) -> Components:
    means = {part: float(seconds) / calls for part, seconds in parts.items()}
    rest = max(0.0, total_s / calls - sum(means.values()))
    shown = {part: value for part, value in {**means, "other": rest}.items() if value > 1e-9}
    return Components(name, calls, float(total_s) / calls, shown)


def place(name: str) -> tuple[int, str]:
    """Sorts the known tools first."""
    return (TOOLS.index(name), "") if name in TOOLS else (len(TOOLS), name)
