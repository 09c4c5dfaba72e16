"""The baseline on Ray Serve: its config, its deployment class and the builder."""

from __future__ import annotations

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve import Application

from ray_app.baseline.server import ServerSettings, create_app


class BaselineConfig(ServerSettings):
    """Arguments of the baseline application. Fault attempts are counted by each replica for itself."""

    num_replicas: int = Field(1, gt=0)
    num_cpus: float = Field(0.2, ge=0, description="of one replica, logical")
    max_ongoing_requests: int = Field(512, gt=0, description="requests that one replica holds")

    def server(self) -> ServerSettings:
        return ServerSettings(models=self.models, latency=self.latency, failures=self.failures)


class BaselineDeployment:
    """One replica: HTTP through `create_app`, and `info` by handle."""

    def __init__(self, config: BaselineConfig, service_digest: str) -> None:
        self._settings = config.server()
        self._digest = service_digest

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._settings)

    async def info(self) -> dict[str, str]:
        """What this service is: digest and model names."""
        return {"digest": self._digest, "models": ",".join(self._settings.models)}


def baseline_app(config: BaselineConfig, service_digest: str = "") -> Application:
    """The Serve application; `info` reports `service_digest` as this service's identity."""
    deployment = serve.deployment(
        serve.ingress()(BaselineDeployment),
        name="baseline",
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        ray_actor_options={"num_cpus": config.num_cpus},
    )
    return deployment.bind(config, service_digest)
