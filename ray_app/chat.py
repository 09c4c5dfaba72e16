"""The model client: which endpoint a call goes to, and what comes back.

A route is what the config says: model -> endpoints. Keys in the environment change nothing; the
variable that an endpoint names is read when its route is made and sent to that endpoint only.
All retries of a model call happen here, with jitter. What may have been paid for is tried a few times, within
the call's deadline. What the endpoint did not take cost nothing: it is waited for, `patience_s` long.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ray_app import estimate
from ray_app import probe as probing
from ray_app.balance import Homes
from ray_app.config import ModelConfig, Price, Sampling
from ray_app.connections import Connections
from ray_app.endpoint import Answered, Route, TimeLimits, endpoint_url
from ray_app.errors import EndpointError, EvalError, Refusal
from ray_app.faults import Fault
from ray_app.records import ChatReply, Message, Usage
from ray_app.slots import Ending, RouteKey, Sample, Slots
from ray_app.tokens import counter
from ray_app.waits import waiting

MAX_TRIES = 5
BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
# Where nobody is there: to ask again burdens nobody, and a proxy that died is back in a few seconds.
MAX_AWAY_BACKOFF_S = 5.0


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One model call. `session` keeps the turns of one task together on a replica."""

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling
    tools: tuple[Mapping[str, Any], ...] = ()
    session: str = ""


class ChatClient(Protocol):
    async def complete(self, request: ChatRequest) -> ChatReply:
        """The reply. Raises EndpointError (infrastructure), ContextOverflow or Refusal (terminal)."""
        ...


@dataclass(slots=True)
class _Call:
    """A call under way: what was tried for it so far. Times are the event loop's."""

    request: ChatRequest
    model: ModelConfig
    started: float
    deadline: float
    body: bytes
    route: Route | None = None
    tries: int = 0  # that the endpoint took
    refusals: int = 0
    waited_s: float = 0.0  # after refusals
    faults: list[str] = field(default_factory=list)
    failed: dict[str, float] = field(default_factory=dict)  # URL -> when it may be asked again
    denied: set[str] = field(default_factory=set)  # URLs that would deny it again

    def marked(self, error: BaseException) -> None:
        """Write onto `error` where the call went last and what it met: its event records it."""
        error.endpoint = self.route.url if self.route else ""  # type: ignore[attr-defined]
        error.model = self.model.served_name or self.request.model  # type: ignore[attr-defined]
        error.faults = ",".join(self.faults)  # type: ignore[attr-defined]
        passed_over = len(self.faults) - isinstance(error, Exception)
        error.retries = max(passed_over, 0)  # type: ignore[attr-defined]


class Router:
    """The chat client of one process: picks an endpoint, waits for a slot, retries, times, prices.

    `slots` bounds the open calls of each route; without anyone to set limits there are none.
    """

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        service_urls: Mapping[str, str],
        *,
        environ: Mapping[str, str] | None = None,
        rng: random.Random | None = None,
        max_connections: int | None = None,
    ) -> None:
        """`service_urls`: application of the Serve config -> its OpenAI base URL (`http://host:port/app/v1`)."""
        environ = os.environ if environ is None else environ
        self._rng = rng or random.Random()
        self._models = dict(models)
        self._connections = Connections(max_connections)
        self._routes = {
            name: [Route(name, item, endpoint_url(item, service_urls), environ) for item in model.endpoints]
            for name, model in models.items()
        }
        self._homes = {name: Homes() for name in models}
        self.slots: dict[RouteKey, Slots] = {
            route.key: route.slots for routes in self._routes.values() for route in routes
        }

    async def complete(self, request: ChatRequest) -> ChatReply:
        """The reply. A failure carries `endpoint`, `model`, `retries` and `faults`, for its event."""
        model, now = self._models[request.model], asyncio.get_running_loop().time()
        call = _Call(request, model, now, now + model.timeout_s, _encoded(_body(request, model)))
        try:
            return await self._with_retries(call)
        except BaseException as error:
            call.marked(error)
            raise

    async def _with_retries(self, call: _Call) -> ChatReply:
        loop = asyncio.get_running_loop()
        while True:
            fault = None
            route = call.route = self._pick(call)
            route.open += 1
            try:
                return _allowed(self._reply(call, route, await self._attempt(call, route)))
            except Fault as met:
                fault = met
            finally:
                route.open -= 1
            call.faults.append(fault.name)
            call.failed[route.url] = loop.time() + fault.retry_after_s
            if fault.is_denial:
                self._pass_over(call, route, fault.error)
                continue
            if fault.is_refusal:
                await self._wait_out(call, route, fault)
                continue
            call.tries += 1
            if not fault.is_passing or call.tries == MAX_TRIES:
                raise fault.error
            pause_s = self._asked_s(call) + self._backoff_s(call.tries)
            if loop.time() + pause_s >= call.deadline:
                raise self._out_of_time(call, fault.error)
            await asyncio.sleep(pause_s)

    def _pass_over(self, call: _Call, route: Route, denial: EvalError) -> None:
        """An endpoint that refuses our key, or has no such model. Raises AccessDenied where none is left."""
        call.denied.add(route.url)
        routes, name = self._routes[call.request.model], call.request.model
        if len(call.denied) < len(routes):
            route.slots.denial = "" if route.is_healthy else str(denial)
            return
        if all(one.is_denying for one in routes):
            for one in routes:
                one.slots.away = (
                    f"model {name}: every call is denied: {denial}; stopped here: mend the key or "
                    f"models.{name}, and the same command goes on"
                )
        raise denial

    async def _wait_out(self, call: _Call, route: Route, refusal: Fault) -> None:
        """Until an endpoint that did not take the call may be asked again: no part of the call's time.

        Raises EndpointError once the call has waited for `patience_s`.
        """
        call.refusals += 1
        left_s, asked_s = call.model.patience_s - call.waited_s, self._asked_s(call)
        if left_s <= 0 or asked_s >= left_s:
            raise self._given_up(call, refusal.error)
        loop, slots = asyncio.get_running_loop(), route.slots
        most_s = MAX_AWAY_BACKOFF_S if refusal.is_of_absence else MAX_BACKOFF_S
        began = loop.time()
        slots.pausing, slots.refusal = slots.pausing + 1, str(refusal.error)
        try:
            with waiting():
                await asyncio.sleep(min(asked_s + self._backoff_s(call.refusals, most_s), left_s))
        finally:
            slots.pausing -= 1
            waited_s = loop.time() - began
            call.waited_s += waited_s
            call.deadline += waited_s

    def _given_up(self, call: _Call, refusal: EvalError) -> EndpointError:
        """The error of a call that was never taken. Where nobody's was meanwhile, the run has to know."""
        routes, patience_s = self._routes[call.request.model], call.model.patience_s
        now = time.monotonic()
        urls = ", ".join(route.url for route in routes)
        if all(not route.answering and now - route.slots.answered_at >= patience_s for route in routes):
            for route in routes:
                route.slots.away = (
                    f"model {call.request.model}: {urls} answered nothing for {patience_s:g} s (patience_s), "
                    f"the last with: {refusal}; stopped here, the same command goes on"
                )
        return EndpointError(
            f"model {call.request.model}: not taken by {urls} within {patience_s:g} s (patience_s): {refusal}"
        )

    def _pick(self, call: _Call) -> Route:
        """Where it has not been yet; after that, where it may come again, and not twice in a row to one."""
        name, failed, now = call.request.model, call.failed, asyncio.get_running_loop().time()
        usable = self._usable(call)
        if all(route.url in failed for route in usable):
            failed = {url: until for url, until in failed.items() if until > now}
            if call.route and any(route.url not in failed for route in usable if route is not call.route):
                failed[call.route.url] = now
        return self._homes[name].pick(call.request.session, self._left(call), failed)

    def _usable(self, call: _Call) -> list[Route]:
        routes = self._left(call)
        return [route for route in routes if route.is_healthy] or routes

    def _left(self, call: _Call) -> list[Route]:
        routes = self._routes[call.request.model]
        return [route for route in routes if route.url not in call.denied] if call.denied else routes

    async def _attempt(self, call: _Call, route: Route) -> Answered:
        await self._slot(call, route)
        limits = TimeLimits(call.deadline, call.model.first_token_s, call.model.stall_s)
        started, prefill_s, tokens = time.monotonic(), 0.0, 0
        ending: Ending = "cancelled"
        try:
            answered = await route.ask(self._connections.session(), call.body, call.request.session, limits)
            ending, tokens = "ok", answered.answer.usage.completion_tokens
            prefill_s = answered.first - answered.sent
            route.answered()
            return answered
        except Fault as fault:
            ending = fault.ending
            route.failed(fault, call.request.session)
            raise
        finally:
            route.slots.release(Sample(ending, time.monotonic() - started, prefill_s, tokens))

    async def _slot(self, call: _Call, route: Route) -> None:
        """A slot of `route`. The wait is of our own making: part of `queue_s`, not of the call's time."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        with waiting():
            await route.slots.acquire()
        call.deadline += loop.time() - began

    def _asked_s(self, call: _Call) -> float:
        """Seconds that the endpoints ask for. What one of them does holds for no other."""
        now = asyncio.get_running_loop().time()
        free = min(call.failed.get(route.url, now) for route in self._usable(call))
        return max(0.0, free - now)

    def _backoff_s(self, number: int, most_s: float = MAX_BACKOFF_S) -> float:
        return min(BACKOFF_S * 2.0 ** min(number - 1, 16), most_s) * self._rng.uniform(0.5, 1.5)

    def _out_of_time(self, call: _Call, last: Exception) -> EndpointError:
        urls = ", ".join(route.url for route in self._routes[call.request.model])
        return EndpointError(
            f"model {call.request.model}: no complete answer from {urls} within "
            f"{call.model.timeout_s:g} s: {last}"
        )

    def _reply(self, call: _Call, route: Route, answered: Answered) -> ChatReply:
        answer, request = answered.answer, call.request
        usage = answer.usage
        if not usage.prompt_tokens and not usage.completion_tokens:
            tokens = counter(call.model.tokenizer)
            usage = estimate.usage(request.messages, request.tools, answer, tokens)
        return ChatReply(
            content=answer.content,
            tool_calls=answer.tool_calls,
            finish_reason=answer.finish_reason,
            usage=usage,
            model=answer.model or request.model,
            endpoint=route.url,
            queue_s=answered.sent - call.started,
            prefill_s=answered.first - answered.sent,
            decode_s=answered.done - answered.first,
            cost_usd=cost(usage, call.model),
            retries=len(call.faults),
            faults=",".join(call.faults),
        )

    def routes(self) -> dict[str, list[str]]:
        """Model -> the URLs that may answer for it."""
        return {name: [route.url for route in routes] for name, routes in self._routes.items()}

    async def probe(self, model: str) -> str:
        """Ask every endpoint of `model` for its model list, which is free; what is wrong, or ""."""
        http = self._connections.session()
        for route in self._routes[model]:
            found = await probing.listing(route, http, self._models[model])
            if found.problem:
                return f"{route.url}: {found.problem}"
        return ""

    async def examine(
        self, model: str, *, with_tools: bool = False, leave_out: Collection[str] = ()
    ) -> list[probing.Probe]:
        """Ask every endpoint of `model`, but for the URLs to leave out, for its list and for a few tokens,
        which may cost something."""
        http, config = self._connections.session(), self._models[model]
        sampling = Sampling(max_tokens=probing.TOOL_TOKENS if with_tools else probing.TOKENS)
        tools = (probing.TOOL,) if with_tools else ()
        request = ChatRequest(model, (Message("user", probing.QUESTION),), sampling, tools)
        body = _encoded(_body(request, config))
        routes = [route for route in self._routes[model] if route.url not in leave_out]
        asked = (probing.examine(route, http, config, body, with_tools) for route in routes)
        return list(await asyncio.gather(*asked))

    async def close(self) -> None:
        await self._connections.close()


def _allowed(reply: ChatReply) -> ChatReply:
    """The reply. Raises Refusal, which has it, where the endpoint's content filter stopped it."""
    if reply.finish_reason == "content_filter":
        refusal = Refusal(f"endpoint {reply.endpoint}: its content filter stopped the answer")
        refusal.reply = reply
        raise refusal
    return reply


def _body(request: ChatRequest, model: ModelConfig) -> dict[str, Any]:
    sampling = request.sampling
    optional = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "tools": list(request.tools) or None,
        **_tool_options(request, model),
    }
    return {
        "model": model.served_name or request.model,
        "messages": [as_openai(message) for message in request.messages],
        model.token_limit_field: sampling.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **{key: value for key, value in optional.items() if value is not None},
        **model.extra_body,
    }


def _encoded(body: Mapping[str, Any]) -> bytes:
    # A lone surrogate, which a dataset or a model may hold, has no UTF-8 form; services refuse its escape.
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _tool_options(request: ChatRequest, model: ModelConfig) -> dict[str, Any]:
    """What is said of tools beside their schemas; endpoints refuse it where no tool is offered."""
    if not request.tools:
        return {}
    return {
        "tool_choice": None if model.tool_choice == "auto" else model.tool_choice,
        "parallel_tool_calls": False if model.strict_tools else None,
    }


def as_openai(message: Message) -> dict[str, Any]:
    """The message in the chat-completions shape; images follow the text as image parts."""
    if message.role == "tool":
        return {"role": "tool", "content": message.content, "tool_call_id": message.tool_call_id}
    if message.tool_calls:
        calls = [
            {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
        return {"role": message.role, "content": message.content or None, "tool_calls": calls}
    if not message.images:
        return {"role": message.role, "content": message.content}
    images = [{"type": "image_url", "image_url": {"url": url}} for url in message.images]
    return {"role": message.role, "content": [{"type": "text", "text": message.content}, *images]}


def cost(usage: Usage, model: ModelConfig) -> float:
    """US dollars of one call at the model's prices (dollars per million tokens); 0 where it has none."""
    price = model.price or Price()
    cached_price = price.input if price.cached_input is None else price.cached_input
    cached = min(usage.cached_tokens, usage.prompt_tokens)  # some services count them apart
    fresh = usage.prompt_tokens - cached
    total = fresh * price.input + cached * cached_price + usage.completion_tokens * price.output
    return total / 1e6
