"""What was called how often, with which success, for how many tokens and dollars.

An expert's tokens and cost belong to the tool that asked it. Failed calls are paid for too and are counted
in all of it; only times leave them out. A log that tells no prices at all (an imported one) has None in place
of costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from analysis.log import STAGES, TOKENS, WORK, Floats, Mask, RunLog, sums
from analysis.numbers import ordered, quantiles
from analysis.timing import TOOLS

COLUMNS = (*WORK, *STAGES, "is_estimated")
OTHER_WORK = ("orchestrator", "user", "judge", "retrieval", "code")
ROLES = ("orchestrator", "user", "judge")


@dataclass(frozen=True, slots=True)
class ToolRow:
    """Calls of one tool, or of one other kind of work (then `share` is None: it is no tool call).

    `share` is of all tool calls. Times are whole calls that succeeded, in seconds, None where none did.
    """

    name: str
    calls: int
    share: float | None
    errors: int
    mean_s: float | None
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    tokens: int
    cost_usd: float | None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Calls of one tool with one model, or of another kind of work (then `share_of_all` is None).

    `share` is of the calls of that tool, `share_of_all` of all tool calls, `success` the fraction of calls
    that ended well (None where none was made). `estimated_tokens` are those that no endpoint told.
    """

    tool: str
    model: str
    calls: int
    share: float
    share_of_all: float | None
    errors: int
    success: float | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    estimated_tokens: int
    cost_usd: float | None

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Usage:
    """What `python -m analysis usage` prints; `note` is why there is nothing, where there is nothing."""

    run: str
    note: str
    rows: list[UsageRow]


class _Work(NamedTuple):
    """A kind of work: which rows are its calls, and which rows say what it cost."""

    name: str
    calls: Mask
    payers: Mask


def usage(log: RunLog) -> Usage:
    """Tool by model, the most used model of a tool first; then what is no tool call."""
    rows = [] if log.absence else [row for work in _works(log) for row in _by_model(log, work)]
    total = sum(row.calls for row in rows if row.tool not in OTHER_WORK)
    rows = [_with_share(row, total) for row in rows]
    return Usage(log.name, "" if rows else (log.absence or log.no("call")), rows)


def tool_table(log: RunLog) -> list[ToolRow]:
    """The tools, unknown ones after the known, then the models by role, retrieval and code."""
    works = _works(log)
    total = sum(int(work.calls.sum()) for work in works if work.name not in OTHER_WORK)
    return [_tool_row(log, work, total) for work in works]


def _works(log: RunLog) -> list[_Work]:
    tools, called, expert = (
        log.words("tool"),
        log.calls & log.kind("tool_call"),
        log.calls & log.role("expert"),
    )
    names = {*tools.used(called | expert)}
    known = [name for name in TOOLS if name in names] + sorted(names.difference(TOOLS))
    found = [_Work(name, called & tools.is_in(name), expert & tools.is_in(name)) for name in known]
    for name in OTHER_WORK:
        mask = log.calls & (log.role(name) if name in ROLES else log.kind(name))
        if mask.any():
            found.append(_Work(name, mask, mask))
    return found


def _by_model(log: RunLog, work: _Work) -> list[UsageRow]:
    models = log.words("model")
    codes, size = models.codes, len(models.names)
    calls = np.bincount(codes[work.calls], minlength=size)
    errors = np.bincount(codes[work.calls & log.is_error], minlength=size)
    spent = {name: sums(codes[work.payers], log.numbers(name)[work.payers], size) for name in WORK}
    guessed = work.payers & log.is_true("is_estimated")
    estimated = {name: sums(codes[guessed], log.numbers(name)[guessed], size) for name in TOKENS}
    used = np.flatnonzero(calls + np.bincount(codes[work.payers], minlength=size))
    rows = [
        UsageRow(
            tool=work.name,
            model=models.names[code],
            calls=int(calls[code]),
            share=float(calls[code] / calls.sum()) if calls[code] else 0.0,
            share_of_all=None,
            errors=int(errors[code]),
            success=float(1 - errors[code] / calls[code]) if calls[code] else None,
            **{name: int(spent[name][code]) for name in WORK[:3]},
            estimated_tokens=int(sum(of[code] for of in estimated.values())),
            cost_usd=_priced(log, float(spent["cost_usd"][code])),
        )
        for code in used
    ]
    return sorted(rows, key=lambda row: (-row.calls, row.model))


def _with_share(row: UsageRow, total: int) -> UsageRow:
    if row.tool in OTHER_WORK:
        return row
    values = {name: getattr(row, name) for name in UsageRow.__dataclass_fields__}
    return UsageRow(**{**values, "share_of_all": row.calls / total if total else 0.0})


def _tool_row(log: RunLog, work: _Work, total: int) -> ToolRow:
    calls, is_tool = int(work.calls.sum()), work.name not in OTHER_WORK
    times = ordered(log.numbers("duration_s")[work.calls & log.timed])
    p50, p90, p99 = quantiles(times, [0.5, 0.9, 0.99]).tolist() if len(times) else [None] * 3
    tokens = sum(_total(log.numbers(name), work.payers) for name in TOKENS)
    return ToolRow(
        name=work.name,
        calls=calls,
        share=(calls / total if total else 0.0) if is_tool else None,
        errors=int((work.calls & log.is_error).sum()),
        mean_s=float(times.mean()) if len(times) else None,
        p50_s=p50,
        p90_s=p90,
        p99_s=p99,
        tokens=int(tokens),
        cost_usd=_priced(log, _total(log.numbers("cost_usd"), work.payers)),
    )


def _priced(log: RunLog, usd: float) -> float | None:
    return None if np.isnan(log.numbers("cost_usd")).all() else usd


def _total(values: Floats, mask: Mask) -> float:
    return float(np.nansum(values[mask]))
