from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from jobs.hle import ROOT
from ray_app import driver, preview
from ray_app.config import load
from ray_app.hle import read_job
from tests.model_server import chunk, serving, usage

READY = {"index": 0, "id": "t", "function": {"name": "ready", "arguments": "{}"}}


async def shown(folder: Path, model: dict[str, Any], **others: Any) -> tuple[bool, str]:
    """What `--plan` says of the sample config with `model` in place of its own, and `others` beside it."""
    sample = yaml.safe_load((ROOT / "configs" / "hle_sample.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump(sample | {"models": {"baseline": model, **others}}))
    job = read_job(load(folder / "run.yaml"), folder / "run")
    console = Console(file=io.StringIO(), width=200)
    is_complete = await asyncio.to_thread(
        preview.show, job, driver.make_plan(job, retry_failed=False), console
    )
    assert isinstance(console.file, io.StringIO)
    return is_complete, console.file.getvalue()


async def test_a_plan_shows_what_each_endpoint_can_do_and_what_asking_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOOLORCH_HOME", str(tmp_path / "home"))
    calls = [chunk({"tool_calls": [READY]}, "tool_calls"), usage(1000, 500)]
    refusal = (400, {"message": "tools need a parser"}, dict[str, str]())
    async with serving(calls, name="baseline") as able, serving(refusal, name="baseline") as unable:
        priced = {"endpoints": [{"base_url": able.url}], "price": {"input": 2.0, "output": 4.0}}
        _, text = await shown(tmp_path, priced)
        assert "calls tools" in text and able.url in text
        assert "Nothing was started. Probing the routes used 1,500 tokens: $0.0040." in text
        _, text = await shown(tmp_path, priced | {"price": {"input": 0.0, "output": 0.0}})
        assert "Nothing was started or paid. Probing the routes used 1,500 tokens, free of charge." in text
        both = priced | {"endpoints": [{"base_url": able.url}, {"base_url": unable.url}]}
        is_complete, text = await shown(tmp_path, both)
        assert not is_complete
        assert f"missing: orchestrator: {unable.url}: does not answer with tools: HTTP 400" in text
    assert len(unable.requests) == 1


async def test_a_plan_asks_what_is_up_beside_what_will_be_started_and_nothing_that_no_call_goes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOOLORCH_HOME", str(tmp_path / "home"))
    denied = (401, {"message": "who are you"}, dict[str, str]())
    unused = {"endpoints": [{"base_url": "http://127.0.0.1:1/v1", "api_key_env": "NO_SUCH_KEY"}]}
    async with serving(denied, name="baseline") as server:
        both = {"endpoints": [{"service": "baseline"}, {"base_url": server.url}]}
        is_complete, text = await shown(tmp_path, both, unused=unused)
    assert not is_complete and "HTTP 401: who are you" in text
    (tmp_path / "run.yaml").unlink()
    only = {"endpoints": [{"service": "baseline"}]}
    is_complete, text = await shown(tmp_path, only)
    assert is_complete and "(service baseline will be started)" in text
