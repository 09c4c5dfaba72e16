"""What can be set of a retriever: what it serves, how it is deployed, and the knobs that turn while it runs.

Pure values; a mistake in them is found before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ray_app.errors import ConfigError
from ray_app.retrieval.batcher import Limits
from ray_app.retrieval.encoder import BUNDLED, Dtype
from ray_app.retrieval.index import EXACT, MIN_SCORE, postfilter_depth
from ray_app.retrieval.search import MIN_CHARS, Filters
from ray_app.retrieval.web_config import WebConfig

MIN_LOCAL_HITS = 3


class Knobs(BaseModel):
    """What Serve's `user_config` changes in a running replica, without a restart."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mode: str = Field(EXACT, description="exact, or postfilter:K for parity with a global top K")
    min_score: float = Field(MIN_SCORE, description="hits score more than this")
    min_chars: int = Field(MIN_CHARS, ge=0, description="hits have more characters than this")
    max_batch_size: int = Field(64, gt=0, description="queries of one micro-batch")
    token_budget: int = Field(4096, gt=0, description="tokens of one micro-batch, padding included")
    long_tokens: int = Field(128, gt=0, description="longer queries go to a lane of their own")
    batch_wait_s: float = Field(0.0, ge=0, le=1, description="how long single calls gather at the door")

    @model_validator(mode="before")
    @classmethod
    def _faiss_k_is_a_mode(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "faiss_k" not in values:
            return values
        rest = {name: value for name, value in values.items() if name != "faiss_k"}
        mode = EXACT if values["faiss_k"] is None else f"postfilter:{values['faiss_k']}"
        if rest.get("mode", mode) != mode:
            raise ValueError(f"mode {rest['mode']!r} and faiss_k {values['faiss_k']!r} differ; give one")
        return {**rest, "mode": mode}

    @field_validator("mode")
    @classmethod
    def _known_mode(cls, mode: str) -> str:
        postfilter_depth(mode)
        return mode

    def changed(self, values: Mapping[str, Any]) -> Self:
        """These knobs with `values` in place of some. Raises ValueError (pydantic's) for a wrong one."""
        given = {"mode"} if "faiss_k" in values else set()
        return type(self).model_validate({**self.model_dump(exclude=given), **values})


class Autoscaling(BaseModel):
    """How many replicas follow the load: as many as hold `target_queries` queries each."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(gt=0)
    target_queries: float = Field(128, gt=0, description="queries that wait in one replica")
    upscale_delay_s: float = Field(10.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is over max_replicas {self.max_replicas}")
        return self


class RetrieverConfig(Knobs):
    """Arguments of the retriever application. Its knobs are what a replica begins with.

    Either `index_dir` (built before), or `corpus_jsonl`, from which an index is built at the first start.
    """

    index_dir: Path | None = None
    corpus_jsonl: Path | None = None
    examples: Path | None = Field(None, description="question id -> allowed document ids")
    cache_dir: Path | None = Field(None, description="where indexes are built; default: the user's cache")
    encoder: str = Field(BUNDLED, description="minilm, a model folder, a hub id, or module:factory")
    device: str = "cpu"
    dtype: Dtype = "float32"
    truncate_dim: int | None = Field(None, gt=0, description="first dimensions of a model trained for it")
    unscoped: Literal["deny", "search"] = "deny"
    web: WebConfig | None = Field(None, description="the paid fallback of scoped queries; off by default")
    min_local_hits: int = Field(MIN_LOCAL_HITS, ge=0, description="with fewer, the web is asked")
    max_ongoing_requests: int = Field(512, gt=0, description="queries that one replica holds")
    max_queued_requests: int = Field(1024, gt=0, description="calls that wait at each caller; then 503")
    num_cpus: float = Field(1.0, gt=0, description="of one replica; also its encoder threads")
    num_gpus: float | None = Field(None, ge=0, description="of one replica; default: 1 for a cuda device")
    num_replicas: int = Field(1, gt=0)
    autoscaling: Autoscaling | None = Field(None, description="in place of num_replicas")
    drain_s: float = Field(60.0, gt=0, description="a replica that leaves has so long to answer")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.index_dir is None) == (self.corpus_jsonl is None):
            raise ValueError("give index_dir or corpus_jsonl, and not both")
        if self.examples is None and self.unscoped == "deny":
            raise ValueError("without examples every query would be refused; set unscoped: search")
        if self.autoscaling is not None and self.num_replicas != 1:
            raise ValueError("give num_replicas or autoscaling, and not both")
        return self

    @property
    def knobs(self) -> Knobs:
        return Knobs.model_validate(self.model_dump(include=set(Knobs.model_fields)))

    def limits(self, knobs: Knobs) -> Limits:
        return Limits(self.max_ongoing_requests, knobs.max_batch_size, knobs.token_budget, knobs.long_tokens)

    def filters(self, knobs: Knobs) -> Filters:
        return Filters(knobs.min_score, knobs.min_chars, knobs.mode, self.unscoped)


def knobs_of_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The knobs that the variables of the older retriever set. Raises ConfigError naming a wrong one."""
    found: dict[str, Any] = {}
    for name, knob, unit in (
        ("RETRIEVAL_FAISS_K", "faiss_k", 1),
        ("RETRIEVAL_MAX_BATCH_SIZE", "max_batch_size", 1),
        ("RETRIEVAL_MAX_WAIT_MS", "batch_wait_s", 1000),
    ):
        if text := environ.get(name, "").strip():
            if not (text.isascii() and text.isdigit() and int(text) > 0):
                raise ConfigError(f"{name} is {text!r}; expected a whole number above 0, or nothing")
            found[knob] = int(text) if unit == 1 else int(text) / unit
    return found
