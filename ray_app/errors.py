"""The exception tree, typed by the boundary that was crossed.

::

    EvalError
    ├── UserError                 a mistake that the user can mend: one line, exit code 2
    │   ├── ConfigError           run config or command line
    │   ├── DatasetError          questions, scopes, index files
    │   └── RunDirError           run directory: unwritable, in the package, in use, other config
    ├── InfrastructureError       run again on resume; never the model's fault
    │   ├── EndpointError         a model endpoint: down, 5xx, rate limit, hang
    │   ├── AccessDenied          an endpoint refused the key or does not know the model
    │   ├── RetrieverError        the retriever: down, full, time limit
    │   ├── SandboxError          the sandbox itself could not run (not: the code in it failed)
    │   └── StorageError          run directory or object store
    ├── ModelError                terminal for the task: the same call would fail again
    │   ├── ContextOverflow       the prompt is longer than the endpoint accepts
    │   ├── UnusableReply         no message and no tool call, as often as it was asked
    │   └── Refusal               content filter, or a request the endpoint calls invalid
    ├── ToolError                 goes back to the model as tool output
    ├── JudgeError                the rollout is kept, the verdict is owed
    ├── LimitReached              turns, wall time, tokens or cost: an outcome of its own
    └── Diverged                  of a replay: the task asks something that was not recorded

Every class pickles with its message (Ray carries exceptions between processes), and `kind_of`
names the class of failure in the event log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ray_app.records import ChatReply

ErrorKind = Literal["infrastructure", "model", "tool", "judge", "limit", "user", "replay"]


class EvalError(Exception):
    """Base of every error that this system raises on purpose."""

    kind: ErrorKind = "infrastructure"
    # Of a model call that failed although the endpoint answered: what it took is known, and paid for.
    reply: ChatReply | None = None


class UserError(EvalError):
    """A mistake of the user's: printed as one line, exit code 2, nothing started."""

    kind: ErrorKind = "user"


class ConfigError(UserError):
    """The run config or the command line."""


class DatasetError(UserError):
    """Questions, scopes or index files."""


class RunDirError(UserError):
    """The run directory: unwritable, inside the package, in use, or made by another config."""


class InfrastructureError(EvalError):
    """Something around the model broke; the task runs again on resume."""


class EndpointError(InfrastructureError):
    """A model endpoint did not answer as the protocol says."""


class AccessDenied(InfrastructureError):
    """The endpoint refused the key or does not know the model: the user mends it, then resumes."""


class RetrieverError(InfrastructureError):
    """The retriever did not answer, or answered with a server error."""


class SandboxError(InfrastructureError):
    """The sandbox could not start or stop a process; says nothing about the code in it."""


class StorageError(InfrastructureError):
    """The run directory could not be written or read."""


class ModelError(EvalError):
    """The endpoint answered, and would answer the same again: terminal for the task."""

    kind: ErrorKind = "model"


class ContextOverflow(ModelError):
    """The prompt is longer than the endpoint's context."""


class UnusableReply(ModelError):
    """A side's model sent, as often as it was asked, nothing that is a message or a tool call."""


class Refusal(ModelError):
    """The endpoint declined the request: content filter or invalid request."""


class ToolError(EvalError):
    """A tool could not do what was asked; its message is the tool's output to the model."""

    kind: ErrorKind = "tool"


class JudgeError(EvalError):
    """The judge gave no readable verdict; the rollout is kept and the verdict owed."""

    kind: ErrorKind = "judge"


class LimitReached(EvalError):
    """A budget of the task is used up (turns, wall time, tokens or cost)."""

    kind: ErrorKind = "limit"


class Diverged(EvalError):
    """A replayed task asks something that the record does not have; nothing goes out for it."""

    kind: ErrorKind = "replay"


_OF_KIND: dict[str, type[EvalError]] = {
    "infrastructure": InfrastructureError,
    "model": ModelError,
    "tool": ToolError,
    "judge": JudgeError,
    "limit": LimitReached,
    "user": UserError,
    "replay": Diverged,
}


def recorded(kind: str, name: str, message: str) -> EvalError:
    """The error that an event tells of: the class called `name` here, else the first class of its kind."""
    named = globals().get(name)
    if isinstance(named, type) and issubclass(named, EvalError) and named.kind == kind:
        return named(message)
    return _OF_KIND.get(kind, InfrastructureError)(message)


def kind_of(error: BaseException) -> ErrorKind:
    """The failure class of `error`; anything unforeseen counts as infrastructure, so it runs again."""
    return error.kind if isinstance(error, EvalError) else "infrastructure"
