"""Models by config: what is refused, what the shipped files name, and which replica a task's calls go to."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from ray_app import services
from ray_app.config import load
from ray_app.errors import ConfigError
from ray_app.rundir import PACKAGE
from tests.ray_marks import RAY
from tests.retrieval.serving import serving

pytestmark = RAY

SERVE_CONFIGS = sorted([PACKAGE / "serve_config.yaml", *(PACKAGE / "configs").glob("serve_*.yaml")])
RUN_CONFIGS = sorted((PACKAGE / "configs").glob("hle_*.yaml"))
GOOD = {"name": "m", "max_model_len": 4096}
SESSIONS = 200


def application(folder: Path, **changes: Any) -> services.Service:
    """The application `models` of a Serve config whose one model differs from a good one."""
    app = {
        "name": "models",
        "import_path": "ray_app.app:models",
        "args": {"models": [{**GOOD, **changes}]},
    }
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": [app]}))
    found = services.read_serve_config(str(path))
    services.check(found, ["models"])
    return found.services["models"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_modellen": 3}, "did you mean 'max_model_len'?"),
        ({"engine_kwargs": {"max_model_len": 3}}, "engine_kwargs.max_model_len: set `max_model_len`"),
        ({"max_ongoing_requests": 0}, "max_ongoing_requests: input should be greater than 0, got 0"),
        ({"replicas": {"max_replicas": 2, "target_ongoing_requests": 999}}, "999 can never be reached"),
        ({"kind": "cpu", "accelerator_type": "H100"}, "expected null where kind is cpu"),
        ({"gpus_per_worker": 0.5}, "gpu_memory_fraction: 0.9 of a card of which gpus_per_worker has 0.5"),
        ({"chat_template": "no/such.jinja"}, "no such file"),
    ],
)
def test_a_mistake_is_one_line_before_any_model_loads(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match="service models: args: ") as caught:
        application(tmp_path, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_chat_template_travels_as_its_text_and_a_changed_one_is_another_service(tmp_path: Path) -> None:
    from ray_app.app import service_digest
    from ray_app.serving import ModelsConfig

    def identity(**changes: Any) -> str:
        arguments = services._arguments(application(tmp_path, **changes))
        assert isinstance(arguments, ModelsConfig)
        return service_digest("ray_app.app:models", arguments)

    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    first = identity(chat_template=str(template))
    assert first == identity(chat_template="{{ messages }}") != identity()
    template.write_text("{{ messages[0] }}")
    assert first != identity(chat_template=str(template))


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: path.stem)
def test_every_run_config_loads_and_names_services_that_exist(path: Path) -> None:
    config = load(path, environ={})
    services.check(services.read_serve_config(config.services), services.needed(config))


def test_the_open_config_calls_every_model_by_the_name_that_serves_it() -> None:
    config = load(PACKAGE / "configs" / "hle_open.yaml", environ={})
    served = services.read_serve_config(config.services).services
    for name in config.models_used():
        [endpoint] = config.models[name].endpoints
        assert endpoint.service is not None
        [model] = served[endpoint.service].args["models"]
        assert model["name"] == name
        assert model["max_model_len"] == config.models[name].context_length


class Echo:
    """A replica that tells its own name."""

    async def __call__(self, request: Any) -> str:
        from ray import serve

        return str(serve.get_replica_context().replica_id.unique_id)


def deploy(replicas: int) -> None:
    from ray import serve

    from ray_app.serving import Model, deployment_options

    options = deployment_options(Model.model_validate({**GOOD, "replicas": replicas}))
    own = {key: options[key] for key in ("num_replicas", "max_ongoing_requests", "request_router_config")}
    # One version for both sizes: Serve scales, and replaces no replica.
    echo = serve.deployment(Echo, ray_actor_options={"num_cpus": 0}, **own)
    serve.run(echo.options(version="1", _internal=True).bind(), name="echo", route_prefix="/echo")


async def replica_of(url: str, calls: int = 1) -> dict[str, set[str]]:
    """Session -> the replicas that its calls came to, all sessions at once."""
    seen: dict[str, set[str]] = defaultdict(set)

    async def call(http: aiohttp.ClientSession, session: str) -> None:
        async with http.get(f"{url}/echo", headers={"x-session-id": session}) as reply:
            reply.raise_for_status()
            seen[session].add(await reply.text())

    async with aiohttp.ClientSession() as http:
        sessions = [f"task/{number}" for number in range(SESSIONS)]
        await asyncio.gather(*(call(http, session) for session in sessions * calls))
    return seen


async def test_calls_of_one_task_meet_one_replica_and_one_more_replica_moves_few_tasks() -> None:
    with serving(num_cpus=2) as url:
        await asyncio.to_thread(deploy, 4)
        before = await replica_of(url, calls=3)
        assert {len(replicas) for replicas in before.values()} == {1}
        assert len(set[str]().union(*before.values())) == 4, "every replica has some"
        await asyncio.to_thread(deploy, 5)
        after: dict[str, set[str]] = {}
        async with asyncio.timeout(60):  # the proxy hears of the new replica a moment later
            while len(set[str]().union(*before.values(), *after.values())) < 5:
                after = await replica_of(url)
        assert {len(replicas) for replicas in (await replica_of(url, calls=3)).values()} == {1}
        moved = [session for session in before if before[session] != after[session]]
        assert 0 < len(moved) <= 2 / 5 * SESSIONS
        newcomer = set[str]().union(*after.values()) - set[str]().union(*before.values())
        assert {replica for session in moved for replica in after[session]} == newcomer
