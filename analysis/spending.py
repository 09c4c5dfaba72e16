"""What a run cost, by kind of work and by task. US dollars; failed and repeated calls are in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.log import Mask, RunLog, said, sums
from analysis.numbers import ordered, quantiles

COLUMNS = ("prompt_tokens", "completion_tokens", "cost_usd", "web_calls", "task_id")
_KINDS = {"models": "model_call", "web": "retrieval", "code": "code"}


@dataclass(frozen=True, slots=True)
class SpendRow:
    """What one kind of work (`models`, `web`, `code`) cost, the dearest first; models as endpoints name them.

    `calls` are paid web calls where the kind is `web`. Failed and repeated calls are in.
    """

    kind: str
    model: str
    calls: int
    tokens: int
    cost_usd: float


@dataclass(frozen=True, slots=True)
class TaskCost:
    """US dollars of the counted results: a mean one, a middle one, the dearest and its task."""

    mean_usd: float = 0.0
    p50_usd: float = 0.0
    most_usd: float = 0.0
    most_task: str = ""


def spending(log: RunLog) -> list[SpendRow]:
    """What the calls that are asked for cost."""
    rows = []
    for kind, event in _KINDS.items():
        mask = log.calls & log.kind(event)
        if mask.any():
            rows += _by_model(log, mask) if kind == "models" else [_row(log, kind, mask)]
    return sorted(rows, key=lambda row: (-row.cost_usd, row.kind, row.model))


def _by_model(log: RunLog, mask: Mask) -> list[SpendRow]:
    models = log.words("model")
    size, codes = len(models.names), models.codes[mask]
    calls = np.bincount(codes, minlength=size)
    prompt, completion, cost = (
        sums(codes, log.numbers(name)[mask], size)
        for name in ("prompt_tokens", "completion_tokens", "cost_usd")
    )
    return [
        SpendRow("models", name, int(calls[code]), int(prompt[code] + completion[code]), float(cost[code]))
        for code, name in enumerate(models.names)
        if calls[code]
    ]


def _row(log: RunLog, kind: str, mask: Mask) -> SpendRow:
    calls = int(log.pick("web_calls", mask).sum()) if kind == "web" else int(mask.sum())
    return SpendRow(kind, "", calls, 0, float(log.pick("cost_usd", mask).sum()))


def task_cost(results: RunLog) -> TaskCost:
    """The costs of counted results; zero where none says what it cost."""
    costs = results.numbers("cost_usd")
    known = ordered(said(costs))
    if not len(known):
        return TaskCost()
    tasks = results.words("task_id")
    dearest = tasks.names[tasks.codes[int(np.nanargmax(costs))]]
    return TaskCost(float(known.mean()), float(quantiles(known, [0.5])[0]), float(known[-1]), dearest)
