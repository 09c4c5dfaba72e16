"""Timings out of the text log of older systems, by regular expressions, for comparison with the query.

Both read each line once and take what `timing` shows: the times of each tool and model by stage, and tokens.
`by_field` looks for each field of a line by itself, as the older scripts did, with compiled patterns; it does
not depend on the order of fields, of which a line may lack some. `by_line` has one pattern for the whole of
each kind of line: the least that regular expressions can do, and it breaks where a field is added.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Found = dict[tuple[str, str], NDArray[np.float64]]

_INFER, _PREFILL, _DECODE, _PROMPT, _COMPLETION = (
    f"toolorchestra_vllm_{name}"
    for name in ("infer_ms", "prefill_ms", "decode_ms", "prefill_len", "decode_len")
)
_PARTS = {
    "search": ("query_llm_ms", "retrieval_ms"),
    "enhance_reasoning": ("llm_ms", "exec_ms"),
    "answer": (),
}
_LLM = {
    "inference": _INFER,
    "prefill": _PREFILL,
    "decode": _DECODE,
    "prompt": _PROMPT,
    "completion": _COMPLETION,
}
_TOOL_LINE = re.compile(
    r" type=tool_call \S+ \S+ tool=(\S+) model=(\S+) duration_ms=(\S+)"
    r"(?:.* (?:query_llm_ms|llm_ms)=(\S+) (?:retrieval_ms|exec_ms)=(\S+))?"
)
_LLM_LINE = re.compile(
    r" type=llm_call \S+ \S+ model=(\S+) backend=\S+ duration_ms=(\S+) "
    + " ".join(rf"{field}=(\S+)" for field in _LLM.values())
)
_JUDGE_LINE = re.compile(r" type=evaluator model=(\S+) duration_ms=(\S+)")


def by_field(path: Path) -> Found:
    """Each field of each line looked for by itself."""
    names = (
        "tool",
        "model",
        "duration_ms",
        *_LLM.values(),
        *(part for parts in _PARTS.values() for part in parts),
    )
    find = {name: re.compile(rf" {name}=(\S+)").search for name in names}
    tool_of, model_of, duration_of = (find[name] for name in ("tool", "model", "duration_ms"))
    found = defaultdict[tuple[str, str], list[float]](list)
    with path.open() as file:
        for line in file:
            if " type=tool_call " in line:
                tool = tool_of(line)[1]  # type: ignore[index]
                duration = float(duration_of(line)[1])  # type: ignore[index]
                found["tool", tool].append(duration)
                found["model", model_of(line)[1]].append(duration)  # type: ignore[index]
                for part in _PARTS[tool]:
                    found["stage", part].append(float(find[part](line)[1]))  # type: ignore[index]
            elif " type=llm_call " in line:
                found["model", model_of(line)[1]].append(float(duration_of(line)[1]))  # type: ignore[index]
                for name, field in _LLM.items():
                    found["orchestrator", name].append(float(find[field](line)[1]))  # type: ignore[index]
            elif " type=evaluator " in line:
                found["stage", "judge"].append(float(duration_of(line)[1]))  # type: ignore[index]
    return {key: np.array(values) for key, values in found.items()}


def by_line(path: Path) -> Found:
    """One pattern for the whole of a line."""
    found = defaultdict[tuple[str, str], list[float]](list)
    with path.open() as file:
        for line in file:
            if match := _TOOL_LINE.search(line):
                tool, model, duration, expert, work = match.groups()
                found["tool", tool].append(float(duration))
                found["model", model].append(float(duration))
                for part, value in zip(_PARTS[tool], (expert, work), strict=False):
                    found["stage", part].append(float(value))
            elif match := _LLM_LINE.search(line):
                model, duration, *values = match.groups()
                found["model", model].append(float(duration))
                for name, value in zip(_LLM, values, strict=True):
                    found["orchestrator", name].append(float(value))
            elif match := _JUDGE_LINE.search(line):
                found["stage", "judge"].append(float(match[2]))
    return {key: np.array(values) for key, values in found.items()}
