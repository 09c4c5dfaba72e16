"""tau2-bench's own runner, as a user starts it: `python -m benchmarks.tau2_official` with one JSON argument.

Imports nothing of ours: what is measured here is its threads, its model layer and its results file. With
`is_capped` false, the ten connections that its model layer allows itself become as many as it asks for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_STEPS = 200


@dataclass(frozen=True, slots=True)
class Official:
    """One domain's run: seconds from the call of `run_tasks` to its return, how many tasks it solved."""

    domain: str
    took_s: float
    solved: int
    cpu_s: float
    all_cpu_s: float  # of the process until then, its start too


def run_official(
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    folder: Path,
    url: str,
    in_flight: int,
    *,
    is_capped: bool,
) -> list[Official]:
    """Each domain's tasks, one domain after the other, in a process of its own."""
    folder.mkdir()
    (folder / "tasks.json").write_text(json.dumps(tasks))
    facts = json.dumps({"folder": str(folder), "url": url, "in_flight": in_flight, "is_capped": is_capped})
    environ = {
        **os.environ,
        "OPENAI_API_KEY": "none",
        "OPENAI_API_BASE": f"{url}/judge/v1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.tau2_official", facts]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"tau2-bench's runner ended with {done.returncode}: {done.stderr[-2000:]}")
    return [Official(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    facts = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    import litellm
    from tau2.data_model.tasks import Task
    from tau2.run import run_tasks
    from tau2.utils import llm_utils

    if not facts["is_capped"]:
        limits = llm_utils.httpx.Limits(max_keepalive_connections=None, max_connections=None)
        litellm.client_session = llm_utils.httpx.Client(limits=limits)
    folder, found = Path(facts["folder"]), []
    for domain, raw in json.loads((folder / "tasks.json").read_text()).items():
        tasks = [Task.model_validate(each) for each in raw]
        started, burned = time.time(), time.process_time()
        results = run_tasks(
            domain,
            tasks,
            "llm_agent",
            "user_simulator",
            llm_agent="openai/gold-agent",
            llm_args_agent={"api_base": f"{facts['url']}/agent/v1", "temperature": 0.0},
            llm_user="openai/gold-user",
            llm_args_user={"api_base": f"{facts['url']}/user/v1", "temperature": 0.0},
            max_steps=MAX_STEPS,
            max_concurrency=facts["in_flight"],
            save_to=folder / f"{domain}.json",
            console_display=False,
            log_level="CRITICAL",
        )
        solved = sum(bool(run.reward_info and run.reward_info.reward == 1.0) for run in results.simulations)
        spent = time.process_time() - burned
        took = {"took_s": time.time() - started, "cpu_s": spent, "all_cpu_s": time.process_time()}
        found.append({"domain": domain, "solved": solved, **took})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
