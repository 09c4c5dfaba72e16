"""A counted result and its calls in the form of `{id}.json`, the result file of earlier systems.

Question and reference answer are not in the log, so they are left out; `--adopt` then takes the dataset's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ray_app import extract

Rows = list[dict[str, Any]]
Fields = Iterator[tuple[str, Any]]


def seed_result(row: Mapping[str, Any], calls: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A counted result and its calls in the form of `{id}.json`, as far as the log has it.

    Of a turn that was asked more than once, the last asking counts, as it does on a resume.
    """
    turns: dict[int, Rows] = {}
    for call in calls:
        turns.setdefault(call["turn"], []).append(dict(call))
    tool_calls: list[Any] = []
    messages, responses = {}, {}
    for number, own in sorted(turns.items()):
        chosen = _last(own, "model_call", "orchestrator")
        used = _last(own, "tool_call")
        if chosen is None and used is None:
            continue
        asked = (chosen or {}).get("output") or {}
        named = [
            {"name": call["name"], "arguments": call["arguments"]} for call in asked.get("tool_calls", ())
        ]
        tool_calls.append(named if used is not None else f"342 invalid tool calls {asked.get('content', '')}")
        if used is not None:
            told = [{"tool_name": call["name"], "tool_arguments": call["arguments"]} for call in named]
            messages[f"turn_{number}_message"] = {"content": asked.get("content", ""), "tool_calls": told}
            responses[f"turn_{number}_response"] = [_response(row, number, used, own)]
    is_failed = row["outcome"] in ("failed", "owed")
    value = {
        "id": row["task_id"],
        "all_tool_calls": tool_calls,
        "all_tool_responses": responses,
        "all_message_responses": messages,
        "correct": row["outcome"] == "ok" and row["is_correct"] is True,
        "status": "error" if is_failed else "done",
    }
    return value | ({"error_type": row["error_kind"] or row["outcome"]} if is_failed else {})


def _last(calls: Rows, kind: str, role: str = "") -> dict[str, Any] | None:
    found = [call for call in calls if call["kind"] == kind and (not role or call["role"] == role)]
    return found[-1] if found else None


def _response(row: Mapping[str, Any], turn: int, used: Mapping[str, Any], calls: Rows) -> dict[str, Any]:
    """What the tool of a turn gave, under the names of that form; times in milliseconds.

    There, a tool's error ends the task. One that went back to the model here is none in that sense.
    """
    expert = _last(calls, "model_call", "expert") or {}
    reply = str((expert.get("output") or {}).get("content", ""))
    value = {"tool": used["tool"], "model": used["model"], "id": row["task_id"], "step": turn}
    if used["status"] == "error" and row["outcome"] == "failed":
        value |= {"tool_error": used["error"], "tool_error_type": used["error_kind"]}
    readers = {"search": _of_search, "enhance_reasoning": _of_program, "answer": _of_answer}
    if used["tool"] in readers:
        value |= dict(readers[used["tool"]](row, expert, reply, calls))
    return {name: item for name, item in value.items() if item is not None}


def _of_search(row: Any, expert: Mapping[str, Any], reply: str, calls: Rows) -> Fields:
    found = _last(calls, "retrieval") or {}
    yield "query", extract.tagged(reply, "query") or extract.without_thinking(reply)
    yield "search_results_data", [hit["text"] for hit in found.get("output") or ()]
    yield "_search_backend", found.get("search_backend") or None
    yield "_search_local_hits", found.get("local_hits")
    yield "_search_tavily_hits", found.get("web_hits")
    yield "_query_llm_ms", _ms(expert)
    yield "_retrieval_ms", _ms(found)


def _of_program(row: Any, expert: Mapping[str, Any], reply: str, calls: Rows) -> Fields:
    ran = _last(calls, "code") or {}
    yield "generated_code", extract.program(reply)
    yield "exec_result", (ran.get("output") or {}).get("stdout", "")
    yield "_llm_ms", _ms(expert)
    yield "_exec_ms", _ms(ran)


def _of_answer(row: Mapping[str, Any], expert: Mapping[str, Any], reply: str, calls: Rows) -> Fields:
    judge = _last(calls, "model_call", "judge") or {}
    yield "response", reply
    yield "pred", extract.answer(reply)
    yield "correctness", row["is_correct"] is True
    yield "_expert_ms", _ms(expert)
    yield "_judge_ms", _ms(judge)


def _ms(call: Mapping[str, Any]) -> float | None:
    return 1000 * call["duration_s"] if call else None
