"""The run config: one YAML file, checked once, resolved to one frozen object.

Order of precedence: command line (`--set key=value`), environment (`CONCURRENCY`, `MAX_ROUNDS`,
`EXAMPLE_PATH`, `RUN_NAME`), file, defaults. An unknown key is an error that names the nearest known
one. Keys of API services are named here (`api_key_env`), their values never read or stored.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, overload

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from ray_app.errors import ConfigError
from ray_app.records import digest

ToolName = Literal["enhance_reasoning", "search", "answer"]
TOOL_NAMES: tuple[ToolName, ...] = ("enhance_reasoning", "search", "answer")

# Keys that change how fast or where a run goes, never what it measures: a resume may differ in them.
OPERATIONAL_KEYS = frozenset(
    {"run_name", "concurrency", "workers", "attempts", "services", "endpoints_file", "prompts"}
)
# A price, too: one that is mended in mid-run changes the bill. What the orchestrator was told of it stays.
MODEL_PLACE = frozenset({"endpoints", "timeout_s", "first_token_s", "stall_s", "patience_s", "price"})
CODE_PLACE = frozenset({"usd_per_s"})
# Where a run stops for want of money, and goes on with more, is no part of what it measures.
LIMITS_PLACE = frozenset({"run_cost_usd"})
RETRIEVER_PLACE = frozenset({"service", "url", "timeout_s"})
ENVIRONMENT_KEYS = {"CONCURRENCY": "concurrency", "RUN_NAME": "run_name"}

Config = TypeVar("Config", bound="BaseRun")


class Section(BaseModel):
    """Base of every config section: unknown keys are errors, values are frozen, numbers finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Adaptive(Section):
    """A limit of calls in flight that follows what the endpoint bears, over all workers of the run."""

    max: int = Field(1024, gt=0)
    start: int = Field(default_factory=lambda given: min(128, given["max"]), gt=0)

    @model_validator(mode="after")
    def _start_within(self) -> Adaptive:
        if self.start > self.max:
            raise ValueError(f"expected start <= max, got {self.start} > {self.max}")
        return self


def _limit_kind(value: object) -> str:
    """Which of its forms a limit has, so that a mistake in it is told of that form alone."""
    return "number" if isinstance(value, int) else "word" if isinstance(value, str) else "adaptive"


Limit = Annotated[
    Annotated[Literal["adaptive"], Tag("word")]
    | Annotated[int, Field(gt=0), Tag("number")]
    | Annotated[Adaptive, Tag("adaptive")],
    Discriminator(_limit_kind),
]


class Endpoint(Section):
    """Where a model answers: a URL, or the name of an application in the Serve config."""

    base_url: str | None = None
    service: str | None = None
    api_key_env: str | None = Field(None, description="name of the variable that holds the key")
    concurrency: Limit = Field(
        "adaptive", description="calls in flight at once: adaptive, its start and max, or a fixed number"
    )
    metrics_url: str | None = Field(
        None, description="vLLM's /metrics page, where it is not beside a base_url of a private address"
    )

    @model_validator(mode="after")
    def _one_address(self) -> Endpoint:
        if (self.base_url is None) == (self.service is None):
            raise ValueError("expected exactly one of base_url and service")
        return self


class Price(Section):
    """US dollars per million tokens; cached input costs `input` unless said otherwise. Free is 0."""

    input: float = Field(0.0, ge=0)
    output: float = Field(0.0, ge=0)
    cached_input: float | None = Field(None, ge=0)


class ModelConfig(Section):
    """One model: its endpoints and what a caller must know to stay inside its limits."""

    endpoints: tuple[Endpoint, ...] = Field(min_length=1)
    served_name: str | None = Field(None, description="the name that the endpoint knows it by")
    context_length: int = Field(32768, gt=0)
    tokenizer: str = Field("words", description="words, or a tokenizer.json / hub id of the model's own")
    price: Price | None = Field(None, description="none: unpriced, and said so; a model of your own costs 0")
    accepts_images: bool = False
    answer_format: Literal["tags", "boxed"] = "tags"
    timeout_s: float = Field(
        600.0, gt=0, description="of a call with all its attempts, less its waits for an endpoint"
    )
    patience_s: float = Field(
        600.0,
        gt=0,
        description="how long a call waits for endpoints that take none (429, 502, 503, no connection); "
        "where they answer nobody for so long, the run ends and can be resumed",
    )
    first_token_s: float | None = Field(
        None, gt=0, description="an endpoint that sends nothing for this long is given up for another attempt"
    )
    stall_s: float = Field(
        120.0, gt=0, description="the same, once its answer has begun and no more of it comes"
    )
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what the endpoint calls it; OpenAI's reasoning models want the second"
    )
    tool_choice: Literal["auto", "required"] = Field(
        "auto", description="required: the endpoint forces a call where tools are offered"
    )
    strict_tools: bool = Field(
        False, description="ask the endpoint to decode calls by the tools' schema, one call a reply"
    )
    extra_body: dict[str, Any] = {}

    @field_validator("extra_body")
    @classmethod
    def _is_json(cls, body: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(body, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise ValueError(f"expected what JSON can say ({error})") from None
        return body

    @model_validator(mode="after")
    def _each_address_once(self) -> Self:
        """Health, homes and limits of an endpoint go by its address."""
        places = [item.service or (item.base_url or "").rstrip("/") for item in self.endpoints]
        if twice := [place for place in places if places.count(place) > 1]:
            raise ValueError(f"endpoints: expected each address once, got {twice[0]} {len(twice)} times")
        return self


class Sampling(Section):
    """What a call asks for. None leaves a field to the endpoint."""

    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int = Field(8000, gt=0)
    seed: int | None = None


class ContextBudget(Section):
    """How much gathered text a prompt carries, in tokens of the called model."""

    context_tokens: int = Field(24000, gt=0)
    code_tokens: int = Field(12000, gt=0)
    document_chars: int | None = Field(1000, gt=0, description="per document; null for the whole text")


class Alias(Section):
    """A name that the orchestrator may choose for a tool, and the model behind it."""

    model: str
    blurb: str = Field("", description="what the orchestrator is told about it")
    latency_s: float | None = Field(None, description="typical seconds a call, told to the orchestrator")
    told_price: Price | None = Field(
        None, description="what the orchestrator is told that it costs; its model's price unless given"
    )
    sampling: Sampling = Sampling()
    budget: ContextBudget = ContextBudget()

    def told(self, model: ModelConfig) -> Price | None:
        """The price that stands in the orchestrator's prompt; None: nothing of it does."""
        return self.told_price or model.price


class OrchestratorSampling(Sampling):
    temperature: float | None = Field(1.0, ge=0)
    max_tokens: int = Field(12000, gt=0)


class OrchestratorBudget(ContextBudget):
    context_tokens: int = Field(27000, gt=0)
    document_chars: int | None = Field(1200, gt=0, description="per document; null for the whole text")


class JudgeSampling(Sampling):
    temperature: float | None = Field(0.0, ge=0)
    max_tokens: int = Field(4096, gt=0)


class Orchestrator(Section):
    """The model that picks tools. The problem's own tokens come out of `budget.context_tokens`."""

    model: str
    sampling: OrchestratorSampling = OrchestratorSampling()
    budget: OrchestratorBudget = OrchestratorBudget()
    require_documents: bool = Field(False, description="refuse `answer` while no document was found")
    repeat_tool: Literal["allow", "forbid"] = Field(
        "allow", description="forbid: a tool used in the last two turns is not offered"
    )


class Judge(Section):
    model: str
    sampling: JudgeSampling = JudgeSampling()
    official_prompt_digest: str | None = Field(
        None, description="digest of the official judge prompt; a user's prompt that has it is labelled hle"
    )


class Dataset(Section):
    """`path`: "sample", a JSONL file in the HLE format, or the hub name cais/hle."""

    path: str = "sample"
    revision: str | None = Field(None, description="commit of the hub dataset; required for cais/hle")
    token_env: str = "HF_TOKEN"
    subset: Literal["all", "text"] = Field("all", description="text: leave out questions with an image")
    policy: Literal["scoped", "subset", "unscoped"] = Field(
        "scoped",
        description="scoped: every question needs a scope; subset: run those that have one; "
        "unscoped: search the whole corpus",
    )
    scopes: str | None = Field(None, description="examples.json: question id -> allowed document ids")
    limit: int | None = Field(None, gt=0)


class Retriever(Section):
    """An application of the Serve config (called by handle), or a URL with the `/retrieve` contract."""

    service: str | None = "retriever"
    url: str | None = None
    top_k: int = Field(50, gt=0)
    timeout_s: float = Field(60.0, gt=0)
    query_chars: int = Field(390, gt=0)
    min_query_chars: int = Field(5, ge=0)
    enabled: bool = True


class TaskLimits(Section):
    """Budgets of one task; reaching one is an outcome (`limited`), not an error."""

    wall_s: float | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0)
    cost_usd: float | None = Field(None, gt=0)
    run_cost_usd: float | None = Field(
        None, gt=0, description="of the whole run: what is in flight then stays pending for a higher limit"
    )


class Limits(TaskLimits):
    max_rounds: int = Field(50, gt=0)


class CodeExecution(Section):
    enabled: bool = True
    wall_s: float = Field(60.0, gt=0)
    memory_mib: int = Field(2048, gt=0)
    require_isolation: bool = Field(False, description="refuse to run where a sandbox layer is missing")
    usd_per_s: float = Field(0.0, ge=0, description="price of a second of a program's run")


class BaseRun(Section):
    """What every run depends on, whatever its benchmark."""

    environment_keys: ClassVar[Mapping[str, str]] = ENVIRONMENT_KEYS

    benchmark: str
    run_name: str | None = None
    models: dict[str, ModelConfig]
    limits: TaskLimits = TaskLimits()
    trials: int = Field(1, gt=0)
    attempts: int = Field(3, gt=0, description="attempts per task while infrastructure fails")
    concurrency: int = Field(64, gt=0, description="tasks in flight over all workers")
    workers: int = Field(2, gt=0)
    prompts: str | None = Field(None, description="folder of templates that replace ours")
    services: str | None = Field(
        "serve_config.yaml", description="Serve config to deploy what is missing from"
    )
    endpoints_file: str | None = Field(
        None, description="model -> [{ip_addr, port}] JSON that overrides endpoints"
    )

    def routes(self) -> dict[str, str]:
        """Dotted key of each part that calls a model -> that model; `orchestrator` and `judge` among them."""
        raise NotImplementedError

    def dataset_name(self) -> str:
        """A short name of what is run, for the run directory."""
        raise NotImplementedError

    def expected_calls(self) -> dict[str, float]:
        """Model -> calls that a task is assumed to make, where no run is there to learn from."""
        raise NotImplementedError

    def retriever_used(self) -> Retriever | None:
        """The retriever that the run asks or starts, if any."""
        return None

    @model_validator(mode="after")
    def _names_resolve(self) -> Self:
        for where, model in self.routes().items():
            if model not in self.models:
                known = ", ".join(self.models)
                raise ValueError(f"{where}.model: unknown model {model!r}; models has {known}")
        limited = [key for key in ("cost_usd", "run_cost_usd") if getattr(self.limits, key) is not None]
        if limited and (unpriced := self.unpriced()):
            raise ValueError(
                f"limits.{limited[0]}: models.{unpriced[0]} has no price, so spending is not known; "
                "give one (0 where it is free)"
            )
        return self

    def models_used(self) -> list[str]:
        """The models that calls can go to, each once."""
        return sorted(set(self.routes().values()))

    def called(self) -> dict[str, ModelConfig]:
        """The models in use; another one's key need not be there, nor its service."""
        return {name: self.models[name] for name in self.models_used()}

    def unpriced(self) -> list[str]:
        """The models in use whose calls are counted as free for want of a price."""
        return [name for name in self.models_used() if self.models[name].price is None]

    def estimated(self) -> list[str]:
        """The models in use whose tokens are estimated."""
        return [name for name in self.models_used() if self.models[name].tokenizer == "words"]

    def key_names(self) -> list[str]:
        """The variables that hold keys of the models used."""
        endpoints = [endpoint for name in self.models_used() for endpoint in self.models[name].endpoints]
        return sorted({endpoint.api_key_env for endpoint in endpoints if endpoint.api_key_env})

    def measured(self) -> dict[str, Any]:
        """The part of the config that decides what is measured; the rest may differ on resume."""
        whole = self.model_dump(mode="json")
        whole["models"] = {name: _without(model, MODEL_PLACE) for name, model in whole["models"].items()}
        if whole.get("retriever"):
            whole["retriever"] = _without(whole["retriever"], RETRIEVER_PLACE)
        whole["limits"] = _without(whole["limits"], LIMITS_PLACE)
        return {key: value for key, value in whole.items() if key not in OPERATIONAL_KEYS}

    def told(self, aliases: Mapping[str, Alias]) -> dict[str, Any]:
        """Aliases with the price that each is told at: part of the orchestrator's prompt."""
        told = {}
        for name, alias in aliases.items():
            price = alias.told(self.models[alias.model])
            shown = None if price is None else {"input": price.input, "output": price.output}
            told[name] = alias.model_dump(mode="json") | {"told_price": shown}
        return told

    @property
    def digest(self) -> str:
        return digest(self.measured())


class RunConfig(BaseRun):
    """A run of Humanity's Last Exam. `jobs/hle.py --config FILE` reads it."""

    environment_keys: ClassVar[Mapping[str, str]] = ENVIRONMENT_KEYS | {
        "MAX_ROUNDS": "limits.max_rounds",
        "EXAMPLE_PATH": "dataset.path",
    }

    benchmark: Literal["hle"] = "hle"
    protocol: Literal["toolorchestra", "hle-style"] = "toolorchestra"
    dataset: Dataset = Dataset()
    orchestrator: Orchestrator
    tools: dict[ToolName, dict[str, Alias]]
    judge: Judge
    retriever: Retriever = Retriever()
    code: CodeExecution = CodeExecution()
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _can_answer(self) -> Self:
        for tool, aliases in self.tools.items():
            if not aliases:
                raise ValueError(f"tools.{tool}: expected at least one alias, or leave the tool out")
        if "answer" not in self.tools:
            raise ValueError("tools: expected at least `answer`; without it no question can end")
        if self.orchestrator.require_documents and not (self.retriever.enabled and "search" in self.tools):
            raise ValueError("orchestrator.require_documents: needs search, or `answer` is never offered")
        return self

    def routes(self) -> dict[str, str]:
        experts = {
            f"tools.{tool}.{name}": alias.model
            for tool, aliases in self.tools.items()
            for name, alias in aliases.items()
        }
        return {"orchestrator": self.orchestrator.model, **experts, "judge": self.judge.model}

    def dataset_name(self) -> str:
        return Path(self.dataset.path).stem

    def expected_calls(self) -> dict[str, float]:
        """Three turns, each of them an orchestrator and an expert call, then the judge."""
        experts = [alias.model for aliases in self.tools.values() for alias in aliases.values()]
        parts = [(self.orchestrator.model, 3.0), (self.judge.model, 1.0)]
        return summed([*parts, *((model, 3.0 / len(experts)) for model in experts)])

    def retriever_used(self) -> Retriever | None:
        return self.retriever if self.retriever.enabled and "search" in self.tools else None

    def measured(self) -> dict[str, Any]:
        tools = {name: self.told(aliases) for name, aliases in self.tools.items()}
        code = _without(self.code.model_dump(mode="json"), CODE_PLACE)
        return {**super().measured(), "tools": tools, "code": code}


def summed(parts: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The sum of each name's parts."""
    totals: dict[str, float] = {}
    for name, part in parts:
        totals[name] = totals.get(name, 0.0) + part
    return totals


def _without(section: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


@overload
def load(
    path: Path, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> RunConfig: ...


@overload
def load(
    path: Path,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    kind: type[Config],
) -> Config: ...


def load(
    path: Path,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    kind: type[BaseRun] = RunConfig,
) -> BaseRun:
    """Read `path` as `kind`, apply the environment and `key=value` overrides, check everything.

    Raises ConfigError with one line that names the key, the value and what was expected.
    """
    environ = os.environ if environ is None else environ
    values = _read_yaml(path)
    for variable, key in kind.environment_keys.items():
        if environ.get(variable):
            _assign(values, key, environ[variable], source=variable)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(
                f"--set {override!r}: expected key=value, for example --set limits.max_rounds=10"
            )
        _assign(values, key.strip(), text, source=f"--set {key.strip()}")
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from None
    return _with_endpoints_file(config) if config.endpoints_file else config


def explain(error: ValidationError) -> str:
    """The first problem of a pydantic error in one line, with the nearest known key for a typo."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), _all_keys(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {where!r}{hint}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{where}: {message.lower()}{more}"
    value = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
    return f"{where}: {message[:1].lower()}{message[1:]}{value}{more}"


def _all_keys() -> list[str]:
    sections, found = [Section], set[str]()
    while sections:
        section = sections.pop()
        found |= section.model_fields.keys()
        sections += section.__subclasses__()
    return sorted(found)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"--config {path}: {error.strerror}; expected a run config such as configs/hle_sample.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of config keys, got {type(values).__name__}")
    return values


def _assign(values: dict[str, Any], key: str, text: str, *, source: str) -> None:
    *parents, last = key.split(".")
    section: Any = values
    for part in parents:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{source}: {part!r} is a value, not a section")
    try:
        section[last] = yaml.safe_load(text) if last != "run_name" else text
    except yaml.YAMLError:
        raise ConfigError(f"{source}: {text!r} is not a YAML value") from None


def _with_endpoints_file(config: BaseRun) -> BaseRun:
    """Replace endpoints by those of a `{model: [{"ip_addr", "port"}]}` file; empty lists are ignored."""
    path = Path(config.endpoints_file or "")
    try:
        listed = json.loads(path.read_text())
        addresses = {name: _addresses(items) for name, items in listed.items() if isinstance(items, list)}
    except OSError as error:
        raise ConfigError(f"endpoints_file {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f'endpoints_file {path}: expected {{"model": [{{"ip_addr": ..., "port": ...}}]}} ({error!r})'
        ) from None
    models = dict(config.models)
    for name in models.keys() & addresses.keys():
        if addresses[name]:
            endpoints = tuple(Endpoint(base_url=f"{address}/v1") for address in addresses[name])
            models[name] = models[name].model_copy(update={"endpoints": endpoints})
    changes: dict[str, Any] = {"models": models}
    retriever = config.retriever_used()
    if addresses.get("retrieval") and retriever is not None:
        url = addresses["retrieval"][0]
        changes["retriever"] = retriever.model_copy(update={"service": None, "url": url})
    return config.model_copy(update=changes)


def _addresses(items: list[dict[str, Any]]) -> list[str]:
    return [f"http://{item['ip_addr']}:{int(item['port'])}" for item in items]


def differing_keys(mine: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two resolved configs."""
    keys: list[str] = []
    for key in sorted(set(mine) | set(other)):
        left, right = mine.get(key), other.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            keys += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right:
            keys.append(f"{prefix}{key}")
    return keys
