"""The services of a run: what the Serve config names, what runs, and deploying what is missing.

One file says what is served (`serve_config.yaml`), whether a user types `serve run` or a job starts
what it lacks. A deployed application is used only if its arguments and code are what the job would
deploy; otherwise it is deployed again.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError

from ray_app.config import BaseRun, explain
from ray_app.errors import ConfigError, InfrastructureError
from ray_app.failure import last_error, root_cause
from ray_app.rundir import PACKAGE

READY_TIMEOUT_S = 600
INFO_TIMEOUT_S = 10.0
PROXY_TIMEOUT_S = 60
WAIT_CHARS = 160
SAY_EVERY_S = 10
# What takes long is told of more and more rarely: each time when it has taken so much longer.
SAY_GROWTH = 1.3


@dataclass(frozen=True)
class Service:
    """One application of the Serve config. `args` has, as `user_config`, what its deployments are set to."""

    name: str
    import_path: str
    route_prefix: str
    args: Mapping[str, Any]


@dataclass(frozen=True)
class ServeConfig:
    """The part of a Serve config file that a job needs."""

    host: str = "127.0.0.1"
    port: int = 8000
    proxy_location: str = "EveryNode"
    services: Mapping[str, Service] = field(default_factory=dict)

    def proxy(self, head: str = "127.0.0.1") -> str:
        """The address of Serve's HTTP proxy."""
        return f"http://{head if self.host == '0.0.0.0' else self.host}:{self.port}"

    def urls(self, head: str = "127.0.0.1") -> dict[str, str]:
        """Application -> its OpenAI base URL. `head`: the head node, for a proxy on all interfaces."""
        return {name: f"{self.root(name, head)}/v1" for name in self.services}

    def root(self, name: str, head: str = "127.0.0.1") -> str:
        return f"{self.proxy(head)}{self.services[name].route_prefix.rstrip('/')}"


def read_serve_config(path: str | None) -> ServeConfig:
    """The applications and the HTTP address of a Serve config. Raises ConfigError."""
    if path is None:
        return ServeConfig()
    file = Path(path) if Path(path).is_absolute() else PACKAGE / path
    try:
        values = yaml.safe_load(file.read_text())
        http = values.get("http_options", {})
        services = [
            Service(app["name"], app["import_path"], app.get("route_prefix", "/"), _args(app))
            for app in values["applications"]
        ]
    except OSError as error:
        raise ConfigError(f"services {file}: {error.strerror}; expected a Serve config file") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"services {file}: expected a Serve config with applications ({error!r})") from None
    return ServeConfig(
        http.get("host", "127.0.0.1"),
        http.get("port", 8000),
        values.get("proxy_location", "EveryNode"),
        {service.name: service for service in services},
    )


def _args(app: Mapping[str, Any]) -> dict[str, Any]:
    """The builder's arguments. Serve applies `deployments:` to what the builder made; here it is told.

    Raises ConfigError for what only Serve itself could apply: a job would deploy something else.
    """
    settings: dict[str, Any] = {}
    for deployment in app.get("deployments", ()):
        if other := sorted(deployment.keys() - {"name", "user_config"}):
            raise ConfigError(
                f"service {app['name']}: deployments: {other[0]!r} is not carried over to a job; "
                "set it in `args`, `user_config` alone stays here"
            )
        settings |= deployment.get("user_config") or {}
    return {**app.get("args", {}), **({"user_config": settings} if settings else {})}


def needed(config: BaseRun) -> list[str]:
    """The applications that this run's config refers to."""
    names = [endpoint.service for model in config.models.values() for endpoint in model.endpoints]
    retriever = config.retriever_used()
    if retriever is not None and retriever.url is None:
        names.append(retriever.service)
    return sorted({name for name in names if name})


def check(serve_config: ServeConfig, names: Collection[str]) -> None:
    """Every needed application is in the Serve config and its arguments are valid. Raises ConfigError."""
    for name in names:
        if name not in serve_config.services:
            known = ", ".join(serve_config.services) or "none"
            raise ConfigError(f"service {name!r}: no such application in the Serve config; it has: {known}")
        _arguments(serve_config.services[name])


def ensure(
    serve_config: ServeConfig, names: Collection[str], *, fresh: bool, say: Callable[[str], None]
) -> None:
    """Deploy the applications among `names` that are missing or differ. Needs a connected Ray.

    Raises InfrastructureError, with the reason in one line, when one is not ready in time: its own
    `ready_timeout_s`, as a large model has it, or READY_TIMEOUT_S.
    """
    from ray import serve  # heavy, and `--plan` without a cluster does not need it

    address = {"host": serve_config.host, "port": serve_config.port}
    serve.start(proxy_location=serve_config.proxy_location, http_options=address)
    lacking = []
    for name in names:
        service = serve_config.services[name]
        state = "is redeployed (--fresh)" if fresh else _difference(service)
        say(f"service {name}: {state or 'running, same config and code'}")
        if state:
            lacking.append(service)
    if lacking:
        _deploy(lacking, say)


async def wait_for_proxy(url: str) -> None:
    """Wait until Serve's HTTP proxy answers: it may come up after the applications behind it.

    Raises ConfigError where it does not, as when Serve was started with other http_options.
    """
    for _ in range(PROXY_TIMEOUT_S):
        problem = await probe(f"{url}/-/healthz")
        if not problem:
            return
        await asyncio.sleep(1.0)
    raise ConfigError(
        f"Serve's proxy does not answer at {url} ({problem}); give the services config the http_options that "
        "this cluster's Serve was started with, or `serve shutdown` it"
    )


def _deploy(lacking: Sequence[Service], say: Callable[[str], None]) -> None:
    """All at once: models take minutes each to load, on cards of their own."""
    from ray import serve

    started = time.monotonic()
    targets = [
        serve.RunTarget(
            target=_builder(service)(_arguments(service)),
            name=service.name,
            route_prefix=service.route_prefix,
        )
        for service in lacking
    ]
    serve.run_many(targets, wait_for_applications_running=False)
    waiting, say_at_s = list(lacking), float(SAY_EVERY_S)
    while waiting:
        time.sleep(1.0)
        elapsed_s = time.monotonic() - started
        is_told = elapsed_s >= say_at_s
        waiting = [service for service in waiting if not _is_ready(service, elapsed_s, say, is_told=is_told)]
        if is_told:
            say_at_s = max(elapsed_s + SAY_EVERY_S, elapsed_s * SAY_GROWTH)


def _is_ready(service: Service, elapsed_s: float, say: Callable[[str], None], *, is_told: bool) -> bool:
    """Whether it is; tells of it, and where `is_told` of what it waits for. Raises InfrastructureError."""
    if not _difference(service):
        say(f"service {service.name}: ready after {elapsed_s:.0f} s")
        return True
    limit_s: float = getattr(_arguments(service), "ready_timeout_s", READY_TIMEOUT_S)
    state = _state(service.name)
    if state.reason or elapsed_s >= limit_s:
        reason = state.reason or state.waits_for or "Serve gives no reason"
        raise InfrastructureError(f"service {service.name}: not ready after {elapsed_s:.0f} s: {reason}")
    if is_told:
        why = f"; waits for {state.waits_for}" if state.waits_for else ""
        say(f"service {service.name}: starting ({elapsed_s:.0f} s of at most {limit_s:.0f}{why})")
    return False


class _State(NamedTuple):
    """Of an application that is not ready: why it never will be, or what it waits for."""

    reason: str = ""
    waits_for: str = ""


def _state(name: str) -> _State:
    from ray import serve
    from ray.serve.schema import ApplicationStatus, DeploymentStatus

    from ray_app.replica_logs import replica_logs

    app = serve.status().applications.get(name)
    if app is None:
        return _State()
    if app.status == ApplicationStatus.DEPLOY_FAILED:
        bad = {
            key: item.message
            for key, item in app.deployments.items()
            if item.status == DeploymentStatus.DEPLOY_FAILED
        }
        logs = [text for key in bad for text in replica_logs(name, key)]
        return _State(reason=root_cause([*bad.values(), app.message, *logs]))
    late = {
        key: last_error(item.message)[:WAIT_CHARS]
        for key, item in app.deployments.items()
        if item.status != DeploymentStatus.HEALTHY
    }
    return _State(waits_for=", ".join(f"{key} ({why})" if why else key for key, why in late.items()))


def _difference(service: Service) -> str:
    """Why the service must be deployed, in words; "" when what runs is what we would deploy."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    app = serve.status().applications.get(service.name)
    if app is None:
        return "not deployed; starting it"
    if app.status != ApplicationStatus.RUNNING:
        return f"{app.status.value.lower()}; deploying it again"
    expected = importlib.import_module(service.import_path.partition(":")[0]).service_digest(
        service.import_path, _arguments(service)
    )
    try:
        handle = serve.get_app_handle(service.name)
        if not handle.is_initialized:
            # Ray's throughput mode has a handle share the caller's event loop, and here is none.
            handle._init(_run_router_in_separate_loop=True)
        found = handle.info.remote().result(timeout_s=INFO_TIMEOUT_S).get("digest")
    except Exception as error:  # whatever it is, it cannot be asked, so it is not ours to use
        return f"does not say what it runs ({type(error).__name__}); deploying it again"
    return "" if found == expected else "runs another config or code; deploying it again"


def _builder(service: Service) -> Callable[[BaseModel], Any]:
    module, _, name = service.import_path.partition(":")
    try:
        builder: Callable[[BaseModel], Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"service {service.name}: import_path {service.import_path!r}: {error}") from None
    return builder


def _arguments(service: Service) -> BaseModel:
    """The builder's typed arguments, as Serve itself makes them."""
    builder = _builder(service)
    model: type[BaseModel] = next(hint for name, hint in get_type_hints(builder).items() if name != "return")
    try:
        return model.model_validate(dict(service.args))
    except ValidationError as error:
        raise ConfigError(f"service {service.name}: args: {explain(error)}") from None


async def probe(url: str, timeout_s: float = 3.0) -> str:
    """ "" when something answers HTTP at `url`, else why not."""
    import aiohttp

    try:
        async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as session, session.get(url) as reply:
            return "" if reply.status < 500 else f"HTTP {reply.status}"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return (
            f"{type(error).__name__}: {' '.join(str(error).split())}" if str(error) else type(error).__name__
        )
