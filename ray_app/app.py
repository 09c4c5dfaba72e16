"""The applications that `serve_config.yaml` names, as typed builders.

Each deployment carries a digest of its arguments and of the code, so that a job can tell whether what
is deployed is what it would deploy.
"""

# No `from __future__ import annotations` here: Serve reads the builders' annotations as types.
import subprocess
import sys
from typing import Any

from pydantic import BaseModel, model_validator
from ray.serve import Application

from ray_app.baseline.deployment import BaselineConfig, baseline_app
from ray_app.records import digest
from ray_app.retrieval.build import MANIFEST, index_folder
from ray_app.retrieval.deployment import RetrieverConfig, retriever_app
from ray_app.retrieval.encoder import encoder_label
from ray_app.rundir import PACKAGE, code_digest, commit, home
from ray_app.sample.prepare import prepare, sample_files


class RetrieverArgs(RetrieverConfig):
    """Arguments of `retriever`. `sample: true` stands for the bundled corpus and its scopes."""

    sample: bool = False

    @model_validator(mode="before")
    @classmethod
    def _sample_paths(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {"cache_dir": str(home() / "indexes"), **values}
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
    return retriever_app(args, service_digest("ray_app.app:retriever", args))


def _build_index(args: RetrieverArgs) -> None:
    """Build a missing index here, with every core and progress, rather than in a replica with one core.

    In a process of its own, so that the model leaves no memory behind.
    """
    if args.corpus_jsonl is None or args.cache_dir is None:
        return
    label = encoder_label(args.encoder, args.dtype)
    if (index_folder(args.corpus_jsonl, label, args.cache_dir) / MANIFEST).exists():
        return
    print("index: not there yet, embedding the corpus once", flush=True)
    build = [sys.executable, "-m", "ray_app.retrieval.build", str(args.corpus_jsonl), str(args.cache_dir)]
    # A failure shows itself in the replica, which tries again and gives Serve the reason.
    subprocess.run([*build, args.encoder, args.dtype, args.device], cwd=PACKAGE, check=False)


def baseline(args: BaselineConfig) -> Application:
    """The rule-based baseline models behind the OpenAI chat-completions API."""
    commit()
    return baseline_app(args, service_digest("ray_app.app:baseline", args))


def service_digest(import_path: str, args: BaseModel) -> str:
    """Equal for equal arguments and equal code."""
    return digest([import_path, args.model_dump(mode="json"), code_digest()])
