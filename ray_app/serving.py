"""Models on vLLM behind the OpenAI API: the typed arguments of `ray_app.app:models`, and its application.

All of serving is `ray.serve.llm`'s: engine, ingress, routing by session. This module says in one place what
a model needs, refuses what would start and then fail, and gives the application an identity, so that a job
can tell whether what runs is what it would deploy. The port has no authentication; keep it on loopback or
behind something that has.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ray_app.config import Section
from ray_app.records import digest
from ray_app.rundir import PACKAGE

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.llm import LLMConfig

# A ring of Ray's own over session ids; no replica but a session's own is tried while it is there, because
# any other would have to read the whole conversation again.
SESSION_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
ROUTER_KWARGS = {"num_virtual_nodes": 256, "num_fallback_replicas": 0}

DIGEST_KEY = "service_digest"
# What the engine is told by a field of `Model`; given twice, one of the two would be ignored.
OWN_FIELDS = {
    "model": "source",
    "served_model_name": "name",
    "tensor_parallel_size": "tensor_parallel",
    "pipeline_parallel_size": "pipeline_parallel",
    "max_model_len": "max_model_len",
    "gpu_memory_utilization": "gpu_memory_fraction",
    "tool_call_parser": "tool_parser",
    "enable_auto_tool_choice": "tool_parser",
    "reasoning_parser": "reasoning_parser",
    "chat_template": "chat_template",
    "enable_prefix_caching": "prefix_caching",
}
# The second is for a node lost while it loaded; Serve's own 20 would load a broken checkpoint 20 times.
START_TRIES = 2
TEXT_OF_TEMPLATE = ("{", "\n")


class Scaling(Section):
    """Replicas that follow the queue: as many as keep `target_ongoing_requests` on each."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(gt=0)
    target_ongoing_requests: float = Field(64, gt=0, description="requests that one replica should hold")
    upscale_delay_s: float = Field(30.0, ge=0)
    downscale_delay_s: float = Field(600.0, ge=0, description="long: a model takes minutes to load again")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"expected min_replicas <= max_replicas ({self.max_replicas})")
        return self


class Model(Section):
    """One model: where it comes from, what it runs on, and how its replies are read."""

    name: str = Field(description="what requests call it: `served_name`, or the model's key, of a run config")
    source: str | None = Field(None, description="hub id, local folder on every node, or s3://...; or `name`")
    kind: Literal["gpu", "cpu"] = "gpu"
    accelerator_type: str | None = Field(None, description="Ray's name of a card, such as H100; null for any")
    tensor_parallel: int = Field(1, gt=0)
    pipeline_parallel: int = Field(1, gt=0)
    gpus_per_worker: float = Field(1.0, gt=0, le=1, description="below 1, models share a card")
    num_cpus: float = Field(1.0, ge=0, description="of one replica, logical")
    replicas: int | Scaling = 1
    max_ongoing_requests: int = Field(256, gt=0, description="that one replica holds; more wait outside")
    max_model_len: int = Field(gt=0, description="tokens, prompt and reply together")
    gpu_memory_fraction: float = Field(0.9, gt=0, le=1, description="of a card, for weights and KV cache")
    kv_cache_gib: int = Field(1, gt=0, description="KV cache on a CPU")
    tool_parser: str | None = Field("hermes", description="vLLM's name: hermes, openai, llama3_json, ...")
    reasoning_parser: str | None = None
    chat_template: str | None = Field(None, description="a file, relative to the checkout; or its text")
    prefix_caching: bool = True
    engine_kwargs: dict[str, Any] = Field({}, description="vLLM's own: quantization, dtype, seed, ...")

    @field_validator("chat_template")
    @classmethod
    def _template_text(cls, value: str | None) -> str | None:
        """The text, so that it reaches every node and a change of it is another service."""
        if value is None or any(mark in value for mark in TEXT_OF_TEMPLATE):
            return value
        file = PACKAGE / Path(value)
        if not file.is_file():
            raise ValueError(f"expected a file with a chat template, or its text; no such file: {file}")
        return file.read_text()

    @model_validator(mode="after")
    def _says_each_thing_once(self) -> Self:
        for key, field in OWN_FIELDS.items():
            if key in self.engine_kwargs:
                raise ValueError(f"engine_kwargs.{key}: set `{field}` of the model in its place")
        if self.kind == "cpu" and self.accelerator_type:
            raise ValueError(
                f"accelerator_type: expected null where kind is cpu, got {self.accelerator_type!r}"
            )
        if self.gpu_memory_fraction > self.gpus_per_worker:
            raise ValueError(
                f"gpu_memory_fraction: {self.gpu_memory_fraction:g} of a card of which gpus_per_worker has "
                f"{self.gpus_per_worker:g}; expected at most that"
            )
        if isinstance(self.replicas, Scaling):
            target = self.replicas.target_ongoing_requests
            if target > self.max_ongoing_requests:
                raise ValueError(
                    f"replicas.target_ongoing_requests: {target:g} can never be reached; expected at most "
                    f"max_ongoing_requests ({self.max_ongoing_requests})"
                )
        return self


class ModelsConfig(Section):
    """Arguments of `ray_app.app:models`: one application, one URL, one or several models.

    Where Ray's direct streaming is on (RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1), one model only, and
    `ingress_*` have no use: its replicas answer HTTP themselves.
    """

    models: tuple[Model, ...] = Field(min_length=1)
    ingress_replicas: int = Field(1, gt=0, description="processes that pass requests on")
    ingress_cpus: float = Field(1.0, ge=0, description="of one of them, logical")
    ready_timeout_s: float = Field(1800.0, gt=0, description="how long a job waits for all to load")

    @property
    def identity(self) -> str:
        """Equal for what would run in the same way. Not of all our code: a line changed elsewhere must not
        load a large model again; what serves are the arguments, this module, and Ray's and vLLM's release."""
        arguments = self.model_dump(mode="json", exclude={"ready_timeout_s"})
        source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        return digest([arguments, source, version("ray"), _vllm_version()])


def models_app(config: ModelsConfig, service_digest: str) -> Application:
    """The Serve application of these models; `info` by handle tells `service_digest`."""
    with _quietly():
        return _build(config, service_digest)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what vLLM and Ray say, at their import and of each option, on whoever's console this is."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _build(config: ModelsConfig, service_digest: str) -> Application:
    # Imports vLLM, which takes 10 s and which a plan does not need.
    from ray.llm._internal.serve.constants import RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING
    from ray.serve.llm import build_openai_app

    from ray_app.llm_info import InformingIngress, InformingServer

    configs = [llm_config(model) for model in config.models]
    if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:
        for item in configs:
            item.server_cls = InformingServer
            item.experimental_configs[DIGEST_KEY] = service_digest
        return build_openai_app({"llm_configs": configs})
    return build_openai_app(
        {
            "llm_configs": configs,
            "ingress_cls_config": {
                "ingress_cls": InformingIngress,
                "ingress_extra_kwargs": {DIGEST_KEY: service_digest},
            },
            "ingress_deployment_config": {
                "num_replicas": config.ingress_replicas,
                "max_ongoing_requests": _ingress_limit(config),
                "ray_actor_options": {"num_cpus": config.ingress_cpus},
            },
        }
    )


def llm_config(model: Model) -> LLMConfig:
    """`model` as ray.serve.llm has it."""
    from ray.serve.llm import LLMConfig

    is_cpu = model.kind == "cpu"
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": _source(model)},
        accelerator_type=model.accelerator_type,
        accelerator_config={"kind": model.kind},
        placement_group_config=_placement(model),
        engine_kwargs=_engine_kwargs(model),
        deployment_config=deployment_options(model),
        runtime_env={
            "env_vars": {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": str(model.kv_cache_gib)}
        }
        if is_cpu
        else None,
    )


def _source(model: Model) -> str:
    """Hub ids as they are; a folder that exists here by its whole path, for every worker's own folder."""
    source = model.source or model.name
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _engine_kwargs(model: Model) -> dict[str, Any]:
    reading = {
        "tool_call_parser": model.tool_parser,
        "enable_auto_tool_choice": True if model.tool_parser else None,
        "reasoning_parser": model.reasoning_parser,
        "chat_template": model.chat_template,
    }
    on_gpu = {"gpu_memory_utilization": model.gpu_memory_fraction} if model.kind == "gpu" else {}
    return {
        "tensor_parallel_size": model.tensor_parallel,
        "pipeline_parallel_size": model.pipeline_parallel,
        "max_model_len": model.max_model_len,
        "enable_prefix_caching": model.prefix_caching,
        # Cached prompt tokens have a price of their own, and vLLM tells them only if asked to.
        "enable_prompt_tokens_details": True,
        **on_gpu,
        **{key: value for key, value in reading.items() if value is not None},
        **model.engine_kwargs,
    }


def _placement(model: Model) -> dict[str, Any]:
    """The bundles of the engine's workers. Tensors that are split stay within a node, where cards are linked;
    a pipeline may cross nodes."""
    if model.kind == "cpu":
        return {"bundles": [{"CPU": model.num_cpus}]}
    strategy = "STRICT_PACK" if model.pipeline_parallel == 1 else "PACK"
    return {"bundle_per_worker": {"GPU": model.gpus_per_worker}, "strategy": strategy}


def deployment_options(model: Model) -> dict[str, Any]:
    """Serve's options of the engine's deployment: how many, how much each holds, which one is asked."""
    replicas = model.replicas
    size = (
        {"autoscaling_config": replicas.model_dump()}
        if isinstance(replicas, Scaling)
        else {"num_replicas": replicas}
    )
    return {
        **size,
        "max_ongoing_requests": model.max_ongoing_requests,
        "max_constructor_retry_count": START_TRIES,
        "request_router_config": {
            "request_router_class": SESSION_ROUTER,
            "request_router_kwargs": ROUTER_KWARGS,
        },
        # On a CPU the bundle has them already.
        "ray_actor_options": {"num_cpus": 0 if model.kind == "cpu" else model.num_cpus},
    }


def _ingress_limit(config: ModelsConfig) -> int:
    """As many requests as all replicas hold together, and as many again that wait for them."""
    held = sum(
        model.max_ongoing_requests
        * (model.replicas.max_replicas if isinstance(model.replicas, Scaling) else model.replicas)
        for model in config.models
    )
    return max(2 * held // config.ingress_replicas, 1)


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "none"
