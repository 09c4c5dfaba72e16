"""tau2-bench itself, where it is installed: its domains, its prompts and its evaluator behind our seams.

The one module that imports it. It is found by what it has (`tau2.registry`), never by a version: a registry
package of the same name is an unrelated project. Its model layer is not used; what its evaluator asks a model
is handed to us, asked through the run's own endpoints, recorded, and handed back.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from ray_app import extract
from ray_app.errors import ConfigError, DatasetError, JudgeError
from ray_app.records import Message, digest
from ray_app.tau2.copies import NotCopied, copier
from ray_app.tau2.dialogue import Answered, Call, Entry, Side
from ray_app.tau2.domain import Environment, Schema
from ray_app.tau2.evaluate import needs_judge
from ray_app.tau2.gold import GoldScript
from ray_app.tau2.loop import Rules
from ray_app.tau2.results import message_json, simulation_json
from ray_app.tau2.reward import Reward
from ray_app.tau2.service_desk import domain as service_desk
from ray_app.tau2.simulation import Simulation
from ray_app.tau2.tasks import Action, Assertion, InitialState, TaskSpec, entries_of
from ray_app.tau2.toolkit import Toolkit

# Objects made, less those freed, before the collector looks (Python: 700): some ten airline environments.
COLLECT_AFTER = 1_000_000
DATA_VARIABLE = "TAU2_DATA_DIR"
HOW_TO_INSTALL = (
    "install tau2-bench (see README: tau2-bench's own domains; the registry's `tau2` is another project) and "
    f"set {DATA_VARIABLE} to its data folder, or use --domain {service_desk.NAME}"
)
_judged: ContextVar[str | None] = ContextVar("judged", default=None)
# By domain, solo mode and side: tau2 makes two pydantic models for each tool that it is asked for, a
# millisecond each, and telecom has 43.
_SCHEMAS: dict[tuple[str, bool, Side], tuple[Schema, ...]] = {}
# The kinds of a toolkit's tools, by its class: to tell them, tau2 makes those models again.
_KINDS: dict[type, dict[str, Any]] = {}
_Load = Callable[[type, str], Any]
# What makes copies of a database that was read, by its class and its file as it was then; None where
# nothing does.
_COPIERS: dict[tuple[type, str, int, int], Callable[[], Any] | None] = {}


class _AskedJudge(Exception):
    """Raised where tau2's evaluator would call a model; holds what it would send."""

    def __init__(self, messages: Sequence[Any]) -> None:
        super().__init__("the judge has not been asked yet")
        self.messages = messages


@dataclass(frozen=True)
class _Upstream:
    """The modules of tau2 that are used here."""

    registry: Any
    messages: ModuleType
    tasks: ModuleType
    simulations: ModuleType
    evaluator: ModuleType
    nl_evaluator: ModuleType
    orchestrator: ModuleType
    agents: ModuleType
    users: ModuleType
    toolkits: ModuleType
    environments: ModuleType


def is_installed() -> bool:
    """Whether tau2-bench can be imported, and not another package of that name."""
    with suppress(ConfigError):
        return bool(_upstream())
    return False


def data_folder(environ: Mapping[str, str] = os.environ) -> str | None:
    """The data folder that TAU2_DATA_DIR names, absolute; None where tau2's own checkout is meant."""
    return str(Path(environ[DATA_VARIABLE]).resolve()) if environ.get(DATA_VARIABLE) else None


def use_data(folder: str | None) -> None:
    """Names the data folder for this process; tau2 reads the variable when it is imported."""
    if folder is not None:
        os.environ[DATA_VARIABLE] = folder


@cache
def _upstream() -> _Upstream:
    try:
        with _quiet_import():
            names = {
                "messages": "data_model.message",
                "tasks": "data_model.tasks",
                "simulations": "data_model.simulation",
                "evaluator": "evaluator.evaluator",
                "nl_evaluator": "evaluator.evaluator_nl_assertions",
                "orchestrator": "orchestrator.orchestrator",
                "agents": "agent.llm_agent",
                "users": "user.user_simulator",
                "toolkits": "environment.toolkit",
                "environments": "environment.environment",
            }
            registry = importlib.import_module("tau2.registry").registry
            modules = {name: importlib.import_module(f"tau2.{path}") for name, path in names.items()}
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"tau2-bench is not here ({error}); {HOW_TO_INSTALL}") from None
    modules["nl_evaluator"].generate = _ask_later  # type: ignore[attr-defined]
    _read_databases_once()
    _tell_kinds_once(modules["evaluator"])
    return _Upstream(registry, **modules)


@contextmanager
def _quiet_import() -> Iterator[None]:
    """tau2 loads `.env` files, asks the web for prices, logs to the terminal and warns: not here."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import dotenv
    from loguru import logger

    logger.disable("tau2")
    load = dotenv.load_dotenv
    dotenv.load_dotenv = lambda *args, **kwargs: True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        dotenv.load_dotenv = load


def _ask_later(*, messages: Sequence[Any], **settings: Any) -> Any:
    """In the place of tau2's model call: the reply that was handed in, else the question is raised."""
    reply = _judged.get()
    if reply is None:
        raise _AskedJudge(messages)
    return _upstream().messages.AssistantMessage(role="assistant", content=reply)


def _read_databases_once() -> None:
    """tau2 reads and checks a domain's file for each environment, four times a simulation: half its work."""
    base = importlib.import_module("tau2.environment.db").DB
    load: _Load = base.load.__func__
    base.load = classmethod(lambda cls, path: _loaded(load, cls, path))


def _loaded(load: _Load, kind: type, path: str) -> Any:
    """What `load` reads, new at each call; a copy where its copies have been found to be equal to it."""
    try:
        found = Path(path).stat()
    except OSError:
        return load(kind, path)  # which says it better
    key = kind, str(path), found.st_mtime_ns, found.st_size
    if key not in _COPIERS:
        _COPIERS[key] = _proven_copier(load(kind, path))
    copy = _COPIERS[key]
    return load(kind, path) if copy is None else copy()


def _proven_copier(original: Any) -> Callable[[], Any] | None:
    """What makes copies of the database, where tau2 takes them for equal to it."""
    try:
        copy: Callable[[], Any] = copier(original)
    except NotCopied:
        return None
    return copy if copy().get_hash() == original.get_hash() else None


def _tell_kinds_once(evaluator: Any) -> None:
    """The evaluator asks for the kinds of all tools in each simulation; they are the class's."""
    tell = getattr(evaluator, "get_tool_types", None)
    if tell is None:
        return

    def kinds(kit: Any) -> dict[str, Any]:
        if type(kit) not in _KINDS:
            _KINDS[type(kit)] = tell(kit)
        return dict(_KINDS[type(kit)])

    evaluator.get_tool_types = kinds


def domain_names() -> list[str]:
    return sorted(_upstream().registry.get_domains())


@dataclass(frozen=True)
class UpstreamDomain:
    """One of tau2's domains. Raises ConfigError where tau2 is not installed or has no such domain."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in _upstream().registry.get_domains():
            known = ", ".join([service_desk.NAME, *domain_names()])
            raise ConfigError(f"domain {self.name!r}: no such domain; there are {known}")

    @property
    def greeting(self) -> str:
        return str(_upstream().orchestrator.DEFAULT_FIRST_AGENT_MESSAGE.content)

    def tasks(self, split: str) -> list[dict[str, Any]]:
        try:
            return [_task_json(task) for task in self._load(split)]
        except FileNotFoundError as error:
            raise ConfigError(
                f"domain {self.name}: no {error.filename}; set {DATA_VARIABLE} to tau2-bench's data folder"
            ) from None

    def _load(self, split: str) -> list[Any]:
        registry = _upstream().registry
        load = registry.get_tasks_loader(self.name)
        splits = getattr(registry, "get_task_splits_loader", lambda name: None)(self.name)
        if splits is None:
            return list(load())
        known = splits()
        if split not in known:
            raise DatasetError(f"split {split!r}: {self.name} has {', '.join(known)}")
        return list(load(split))

    def environment(self, *, is_solo: bool = False) -> Environment:
        return UpstreamEnvironment(_upstream().registry.get_env_constructor(self.name)(solo_mode=is_solo))

    def agent_prompt(self, spec: TaskSpec, environment: Environment, *, is_solo: bool) -> str:
        agents, values = _upstream().agents, {"tools": [], "domain_policy": environment.policy, "llm": "none"}
        if is_solo:
            return str(agents.LLMSoloAgent(task=_task(spec), **values).system_prompt)
        return str(agents.LLMAgent(**values).system_prompt)

    def user_prompt(self, spec: TaskSpec, environment: Environment) -> str:
        tools = list(environment.schemas("user", spec.user_tools)) or None
        scenario = str(_task(spec).user_scenario)
        simulator = _upstream().users.UserSimulator(llm="none", instructions=scenario, tools=tools)
        return str(simulator.system_prompt)

    def questions(self, spec: TaskSpec, simulation: Simulation) -> tuple[Message, ...]:
        """What tau2's own evaluator asks its judge."""
        if not needs_judge(spec, simulation):
            return ()
        run = _upstream().simulations.SimulationRun.model_validate(simulation_json(simulation))
        try:
            _upstream().nl_evaluator.NLAssertionsEvaluator.calculate_reward(_task(spec), run.messages)
        except _AskedJudge as asked:
            return tuple(Message(message.role, message.content or "") for message in asked.messages)
        return ()

    def check_judged(self, spec: TaskSpec, judged: str) -> None:
        _clean(judged)

    def reward(self, spec: TaskSpec, simulation: Simulation, judged: str) -> Reward:
        """The official reward. Raises JudgeError where tau2's evaluator fails, as in odd end states."""
        tau2 = _upstream()
        run = tau2.simulations.SimulationRun.model_validate(simulation_json(simulation))
        token = _judged.set(_clean(judged) if judged else None)
        try:
            info = tau2.evaluator.evaluate_simulation(
                simulation=run,
                task=_task(spec),
                evaluation_type=tau2.evaluator.EvaluationType.ALL,
                solo_mode=simulation.is_solo,
                domain=self.name,
            )
        except Exception as error:  # of an assertion that finds nothing to look at, say: no reward is known
            raise JudgeError(f"tau2's evaluator: {type(error).__name__}: {error}") from error
        finally:
            _judged.reset(token)
        record = info.model_dump(mode="json")
        parts = {str(name): float(part) for name, part in (record.get("reward_breakdown") or {}).items()}
        return Reward(float(info.reward), parts, str((info.info or {}).get("note", "")), record)


def _clean(reply: str) -> str:
    """The judge's reply as tau2 reads it. Raises JudgeError where it would not be able to."""
    fields = extract.json_object(extract.without_thinking(reply)) or {}
    results = fields.get("results")
    keys = {"expectedOutcome", "metExpectation", "reasoning"}
    if not isinstance(results, list) or not all(isinstance(r, dict) and keys <= r.keys() for r in results):
        raise JudgeError(f"judge reply {reply[:200]!r}: expected a JSON object with results; judge it again")
    if not results or not all(isinstance(result["metExpectation"], bool) for result in results):
        raise JudgeError(
            f"judge reply {reply[:200]!r}: expected true or false of each outcome; judge it again"
        )
    return json.dumps(fields)


def _task(spec: TaskSpec) -> Any:
    return _upstream().tasks.Task.model_validate(spec.model_dump(mode="json"))


def _task_json(task: Any) -> dict[str, Any]:
    """A task's own data: the times that tau2 stamps its history with at each reading are no part of it."""
    value: dict[str, Any] = task.model_dump(mode="json")
    for message in (value.get("initial_state") or {}).get("message_history") or ():
        message.pop("timestamp", None)
    return value


@dataclass
class UpstreamEnvironment:
    """An environment of tau2's behind our seam."""

    inner: Any

    @property
    def policy(self) -> str:
        return str(self.inner.get_policy())

    def initialise(self, initial: InitialState | None) -> None:
        state = None
        if initial is not None:
            state = _upstream().tasks.InitialState.model_validate(initial.model_dump(mode="json"))
        self.inner.set_state(
            initialization_data=state and state.initialization_data,
            initialization_actions=state and state.initialization_actions,
            message_history=[],
        )

    def schemas(self, side: Side, only: Sequence[str] | None = None) -> tuple[Schema, ...]:
        key = self.inner.get_domain_name(), bool(self.inner.solo_mode), side
        if key not in _SCHEMAS:
            _SCHEMAS[key] = tuple(tool.openai_schema for tool in self._tools(side))
        return tuple(each for each in _SCHEMAS[key] if only is None or each["function"]["name"] in only)

    def _tools(self, side: Side) -> list[Any]:
        tools = list(self.inner.get_tools()) if side == "assistant" else self._user_tools()
        return [*tools, *self._user_tools()] if side == "assistant" and self.inner.solo_mode else tools

    def call(self, call: Call) -> Answered:
        asked = _upstream().messages.ToolCall(
            id=call.call_id, name=call.name, arguments=dict(call.arguments), requestor=call.side
        )
        answer = self.inner.get_response(asked)
        return Answered(call.call_id, answer.content or "", call.side, bool(answer.error))

    def perform(self, action: Action) -> None:
        self.inner.make_tool_call(tool_name=action.name, requestor=action.requestor, **action.arguments)

    def has_tool(self, name: str) -> bool:
        return any(kit is not None and kit.has_tool(name) for kit in self._kits())

    def mutates(self, name: str) -> bool:
        """As tau2 says; an older one, which does not say, is taken to change something with every tool."""
        for kit in self._kits():
            if kit is not None and kit.has_tool(name):
                return bool(kit.tool_mutates_state(name)) if hasattr(kit, "tool_mutates_state") else True
        return True

    def holds(self, assertion: Assertion) -> bool:
        asked = _upstream().tasks.EnvAssertion.model_validate(assertion.model_dump(mode="json"))
        return bool(self.inner.run_env_assertion(asked, raise_assertion_error=False))

    def sync(self) -> None:
        self.inner.sync_tools()

    def state_hash(self) -> str:
        return digest([self.inner.get_db_hash(), self.inner.get_user_db_hash()])

    def fingerprint(self) -> str:
        """Of the data as pydantic writes them, at a quarter of the cost of tau2's own hash."""
        data = [None if kit is None else kit.db for kit in self._kits()]
        if not all(each is None or isinstance(each, BaseModel) for each in data):
            return self.state_hash()
        written = [b"" if each is None else each.model_dump_json().encode() for each in data]
        return digest([hashlib.sha256(each).hexdigest() for each in written])

    def _kits(self) -> tuple[Any, Any]:
        return self.inner.tools, self.inner.user_tools

    def _user_tools(self) -> list[Any]:
        return [] if self.inner.user_tools is None else list(self.inner.get_user_tools())


@dataclass
class _ScriptedSide:
    """A participant of tau2's orchestrator that says what a script says."""

    script: GoldScript
    side: Side

    def get_init_state(self, message_history: object = None) -> None:
        return None

    def set_seed(self, seed: int) -> None:
        return None

    def stop(self, *arguments: object) -> None:
        return None

    def is_stop(self, message: object) -> bool:
        return False

    def generate_next_message(self, message: object, state: None) -> tuple[Any, None]:
        said = message_json(self.script.next(self.side))
        # tau2 orders a dialogue by its times, and stamps messages itself.
        del said["timestamp"]
        kind = "AssistantMessage" if self.side == "assistant" else "UserMessage"
        return getattr(_upstream().messages, kind).model_validate(said), None


@dataclass(frozen=True)
class OfficialRun:
    """What tau2's own orchestrator made of a script."""

    reason: str
    entries: tuple[Entry, ...]
    record: Any  # tau2's SimulationRun


def run_official(domain: UpstreamDomain, spec: TaskSpec, script: GoldScript, rules: Rules) -> OfficialRun:
    """The same script by tau2's own orchestrator, for comparison."""
    environment = domain.environment(is_solo=rules.is_solo)
    assert isinstance(environment, UpstreamEnvironment)
    orchestrator = _upstream().orchestrator.Orchestrator(
        domain=domain.name,
        agent=_ScriptedSide(script, "assistant"),
        user=_ScriptedSide(script, "user"),
        environment=environment.inner,
        task=_task(spec),
        max_steps=rules.max_steps,
        max_errors=rules.max_errors,
    )
    run = orchestrator.run()
    messages = [message.model_dump(mode="json") for message in run.messages]
    return OfficialRun(run.termination_reason.value, entries_of(messages), run)


def register_service_desk() -> None:
    """Make our own domain one of tau2's, under its name. Twice does nothing more."""
    registry = _upstream().registry
    if service_desk.NAME in registry.get_domains():
        return
    registry.register_domain(_service_desk_environment, service_desk.NAME)
    registry.register_tasks(_service_desk_tasks, service_desk.NAME)


def _service_desk_environment(solo_mode: bool = False) -> Any:
    tau2 = _upstream()
    agent, user = _translated(service_desk.agent_tools()), _translated(service_desk.user_tools())

    class Desk(tau2.environments.Environment):  # type: ignore[name-defined,misc]
        def sync_tools(self) -> None:
            service_desk.synchronise(self.tools, self.user_tools)

    desk = Desk(service_desk.NAME, service_desk.policy(), agent, user)
    if solo_mode:
        desk.set_solo_mode(True)
    return desk


def _service_desk_tasks(task_split_name: str | None = "base") -> list[Any]:
    found = service_desk.read_tasks(task_split_name or "base")
    return [_upstream().tasks.Task.model_validate(task) for task in found]


def _translated(kit: Toolkit) -> Any:
    """A toolkit of ours as one of tau2's: the same methods, marked as tau2 marks tools."""
    toolkits = _upstream().toolkits
    methods: dict[str, Any] = {
        name: method
        for each in (Toolkit, type(kit))
        for name, method in vars(each).items()
        if callable(method) and not name.startswith("__") and name not in vars(Toolkit)
    }
    for name in type(kit).tool_names():
        mark: Callable[[Any], Any] = toolkits.is_tool(toolkits.ToolType(kit.kind(name)))
        methods[name] = mark(methods[name])
    return type(type(kit).__name__, (toolkits.ToolKitBase,), methods)(kit.db)


def freeze() -> None:
    """What is loaded now stays, and the collector looks less often at what comes.

    An airline environment is some hundred thousand objects, none of them in a circle: with eight of them
    alive, looking at them took as long as building one.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 20, 20)


def read_results(text: str) -> Any:
    """tau2's own `Results` from their JSON."""
    return _upstream().simulations.Results.model_validate_json(text)
