"""The applications that `serve_config.yaml` names, as typed builders.

Each deployment carries a digest of its arguments and of the code, so that a job can tell whether what
is deployed is what it would deploy.
"""

# No `from __future__ import annotations` here: Serve reads the builders' annotations as types.
import os
from functools import partial
from typing import Any, Self

import ray
from pydantic import BaseModel, Field, model_validator
from ray.serve import Application

from ray_app.baseline.deployment import BaselineConfig, baseline_app
from ray_app.records import digest
from ray_app.retrieval.build import MANIFEST, index_folder
from ray_app.retrieval.build_job import Device, Order, Patience, carry_out
from ray_app.retrieval.config import RetrieverConfig, knobs_of_environment
from ray_app.retrieval.deployment import retriever_app
from ray_app.retrieval.encoder import FACTORY, encoder_label
from ray_app.rundir import code_digest, commit, home
from ray_app.sample.prepare import prepare, sample_files
from ray_app.serving import ModelsConfig, models_app

# The GPU that an index needs may be held by the very replica that it is built for.
GPU_PATIENCE_S = 600.0


class RetrieverArgs(RetrieverConfig):
    """Arguments of `retriever`. `sample: true` stands for the bundled corpus and its scopes.

    Knobs that are not given come from the variables RETRIEVAL_FAISS_K, RETRIEVAL_MAX_BATCH_SIZE and
    RETRIEVAL_MAX_WAIT_MS; `user_config` are those that a running service may be told of.
    """

    sample: bool = False
    user_config: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _knows_its_knobs(self) -> Self:
        self.knobs.changed(self.user_config)
        return self

    @model_validator(mode="before")
    @classmethod
    def _sample_paths(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        knobs = knobs_of_environment(os.environ)
        if "mode" in values:
            knobs.pop("faiss_k", None)
        values = {"cache_dir": str(home() / "indexes"), **knobs, **values}
        if values.get("sample"):
            files = sample_files(home())
            values |= {"corpus_jsonl": str(files.corpus), "examples": str(files.examples)}
        return values


def retriever(args: RetrieverArgs) -> Application:
    """The retriever: `/retrieve` and `/health`, and `retrieve` by handle."""
    if args.sample:
        prepare(home())
    _build_index(args)
    commit()  # noted for jobs that run from a copy of this code without its repository
    return retriever_app(args, service_digest("ray_app.app:retriever", args), args.user_config)


def _build_index(args: RetrieverArgs) -> None:
    """Has a missing index built by the whole cluster, with progress, rather than by a replica with one core.

    Raises EvalError, which Serve or the job shows as the reason.
    """
    if args.corpus_jsonl is None or args.cache_dir is None:
        return
    if FACTORY.fullmatch(args.encoder) or not ray.is_initialized():
        # The replica builds it: only there is known what an encoder of one's own calls itself, and
        # `serve run ray_app.app:retriever` calls this before it joins a cluster.
        return
    label = encoder_label(args.encoder, args.dtype, args.truncate_dim)
    folder = index_folder(args.corpus_jsonl, label, args.cache_dir)
    if (folder / MANIFEST).exists():
        return
    print("index: not there yet, embedding the corpus once", flush=True)
    device: Device = "cuda" if args.device.startswith("cuda") else "cpu"
    order = Order(args.corpus_jsonl, folder, args.encoder, args.dtype, args.truncate_dim, device)
    carry_out(order, partial(print, flush=True), patience=Patience(gpu_s=GPU_PATIENCE_S))


def baseline(args: BaselineConfig) -> Application:
    """The rule-based baseline models behind the OpenAI chat-completions API."""
    commit()
    return baseline_app(args, service_digest("ray_app.app:baseline", args))


def models(args: ModelsConfig) -> Application:
    """Language models on vLLM behind the OpenAI API: `/v1/chat/completions`, `/v1/models`, ..."""
    commit()
    return models_app(args, service_digest("ray_app.app:models", args))


def service_digest(import_path: str, args: BaseModel) -> str:
    """Equal for equal arguments and equal code; what turns while a service runs makes it no other one."""
    if isinstance(args, ModelsConfig):
        return args.identity
    return digest([import_path, args.model_dump(mode="json", exclude={"user_config"}), code_digest()])
