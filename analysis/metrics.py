"""The quantities that get a histogram: what they are in the log, described and binned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.numbers import Histogram, Summary, describe, linear_histogram, log_histogram
from analysis.queries import TOOLS, RunLog

Unit = Literal["ms", "tokens"]
BINS = 10


class Metric(NamedTuple):
    """`value` and `where` are SQL over the `calls` of `queries`."""

    name: str
    title: str
    unit: Unit
    value: str
    where: str


@dataclass(frozen=True, slots=True)
class MetricReport:
    """A metric described, in `unit`; the histograms are None where there is nothing to show."""

    title: str
    unit: Unit
    stats: Summary
    hist_linear: Histogram | None
    hist_log: Histogram | None


_TOOL = "kind = 'tool_call'"
_LLM = "kind = 'model_call' and role = 'orchestrator'"
_TOTAL = "prompt_tokens + completion_tokens"
METRICS = (
    Metric("tool_all", "All tool calls", "ms", "1000 * duration_s", _TOOL),
    *(
        Metric(f"tool_{tool}", f"Tool {tool}", "ms", "1000 * duration_s", f"{_TOOL} and tool = '{tool}'")
        for tool in TOOLS
    ),
    # Prefill plus decode is the model's own time, without the wait for a place at the endpoint.
    Metric("llm_infer_ms", "Orchestrator inference", "ms", "1000 * (prefill_s + decode_s)", _LLM),
    Metric("llm_prefill_ms", "Orchestrator prefill", "ms", "1000 * prefill_s", _LLM),
    Metric("llm_decode_ms", "Orchestrator decode", "ms", "1000 * decode_s", _LLM),
    Metric("llm_prefill_tokens", "Orchestrator prompt length", "tokens", "prompt_tokens", _LLM),
    Metric("llm_decode_tokens", "Orchestrator completion length", "tokens", "completion_tokens", _LLM),
    Metric("llm_total_tokens", "Orchestrator prompt + completion length", "tokens", _TOTAL, _LLM),
)


def describe_metrics(log: RunLog) -> dict[str, MetricReport]:
    """Moments and histograms of all METRICS, in their order."""
    return {metric.name: _describe(metric, metric_values(log, metric)) for metric in METRICS}


def metric_values(log: RunLog, metric: Metric) -> NDArray[np.float64]:
    """The metric of every successful call that has it, in `metric.unit`."""
    query = (
        f"select ({metric.value})::double as value from calls "
        f"where not is_error and {metric.where} and isfinite(value)"
    )
    return np.asarray(log.sql.execute(query).fetchnumpy()["value"], dtype=np.float64)


def _describe(metric: Metric, values: NDArray[np.float64]) -> MetricReport:
    return MetricReport(
        title=metric.title,
        unit=metric.unit,
        stats=describe(values, five_seconds=5000.0 if metric.unit == "ms" else None),
        hist_linear=linear_histogram(values, BINS),
        hist_log=log_histogram(values, BINS),
    )
