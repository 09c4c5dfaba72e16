"""What answers for an application of models, with `info` by handle beside ray.serve.llm's own methods.

A module of its own because importing it imports vLLM.
"""

from __future__ import annotations

from typing import Any

from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.ingress import OpenAiIngress

from ray_app.serving import DIGEST_KEY


class InformingIngress(OpenAiIngress):
    """The OpenAI ingress of an application; takes the identity that its builder gave it."""

    def __init__(self, *args: Any, service_digest: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._service_digest = service_digest

    async def info(self) -> dict[str, str]:
        """What this service is: digest and model names."""
        return {"digest": self._service_digest, "models": ",".join(self._model_cards)}


class InformingServer(LLMServer):
    """An engine's replica that answers HTTP itself, as with Ray's direct streaming."""

    async def info(self) -> dict[str, str]:
        """As InformingIngress.info."""
        config = self._llm_config
        return {"digest": config.experimental_configs[DIGEST_KEY], "models": config.model_id}
