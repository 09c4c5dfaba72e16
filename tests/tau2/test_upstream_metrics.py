"""What tau2-bench itself makes of the results that we write: its loader reads them, its pass^k is ours."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.trials import Tried, pass_hat
from ray_app.tau2 import upstream
from ray_app.tau2.export import results_json
from ray_app.tau2.gold import GoldScript
from ray_app.tau2.results import simulation_json
from ray_app.tau2.run import task_of
from ray_app.tau2.tasks import TaskSpec
from ray_app.tau2.upstream import UpstreamDomain
from tests.tau2.desk import config
from tests.tau2.replays import replayed
from tests.tau2.upstream_marks import UPSTREAM

pytestmark = UPSTREAM

# How many of three trials are gold replays; the others do nothing.
GOLD_OF_THREE = (3, 1, 2, 0)


async def test_its_loader_reads_our_file_and_its_pass_hat_k_is_ours(tmp_path: Path) -> None:
    domain = UpstreamDomain("telecom")
    tasks = domain.tasks("base")[: len(GOLD_OF_THREE)]
    written = []
    for raw, gold in zip(tasks, GOLD_OF_THREE, strict=True):
        spec = TaskSpec.model_validate(raw)
        for trial in range(3):
            script = GoldScript.of(spec) if trial < gold else GoldScript([])
            simulation = replace(await replayed(domain, spec, script), trial=trial)
            written.append(simulation_json(simulation, domain.reward(spec, simulation, "")))
    settings = config(domains=["telecom"], trials=3)
    path = tmp_path / "telecom.json"
    ours = [task_of("telecom", raw) for raw in tasks]
    path.write_text(json.dumps(results_json(settings, ours, "telecom", written)))

    assert upstream.is_installed()
    results = importlib.import_module("tau2.data_model.simulation").Results.load(path)
    assert [(run.task_id, run.trial) for run in results.simulations] == [
        (raw["id"], trial) for raw in tasks for trial in range(3)
    ]
    theirs = importlib.import_module("tau2.metrics.agent_metrics").compute_metrics(results).pass_hat_ks
    tried = [Tried(3, gold) for gold in GOLD_OF_THREE]
    assert theirs == pytest.approx({k: pass_hat([tried], k).value for k in (1, 2, 3)})
