"""The model client: which endpoint a call goes to, and what comes back.

A route is what the config says: model -> endpoints. Keys in the environment change nothing; the
variable that an endpoint names is read when its client is made and sent to that endpoint only.
All retries of a model call happen here (bounded, with jitter); a deadline covers all attempts.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp
import httpx2  # the openai SDK's transport; errors in mid-stream reach us unwrapped
import openai

from ray_app.config import Endpoint, ModelConfig, Price, Sampling
from ray_app.errors import AccessDenied, ConfigError, ContextOverflow, EndpointError, Refusal
from ray_app.records import ChatReply, Message, ToolCall, Usage

MAX_TRIES = 5
BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
# An endpoint that failed is left alone this long while another one of the model can answer.
COOL_DOWN_S = 10.0
CONNECT_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 2048

OVERFLOW_CODES = ("context_length_exceeded", "string_above_max_length")
UNSUPPORTED_CODES = ("unsupported_parameter", "unsupported_value")
OVERFLOW_WORDS = (
    "maximum context length",
    "context length",
    "maximum model length",
    "max_model_len",
    "too many tokens",
)


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


class Route:
    """One endpoint of one model with its open calls and its recent health."""

    def __init__(self, endpoint: Endpoint, url: str, environ: Mapping[str, str]) -> None:
        key = _key(endpoint, environ)
        self.url = url
        self.in_flight = 0
        self.failed_at = float("-inf")
        self.client = openai.AsyncOpenAI(
            base_url=url,
            api_key=key or "none",
            max_retries=0,
            http_client=openai.DefaultAioHttpClient(
                limits=openai.DEFAULT_CONNECTION_LIMITS.__class__(max_connections=MAX_CONNECTIONS),
                timeout=openai.Timeout(None, connect=CONNECT_TIMEOUT_S),
                # A proxy named in the environment is for the outside, never for our own services.
                trust_env=not _is_loopback(url),
            ),
        )
        # The SDK takes these from the environment; they belong to another service than this one.
        self.client.organization = None
        self.client.project = None


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "localhost" or host.startswith("127.") or host == "::1"


def _key(endpoint: Endpoint, environ: Mapping[str, str]) -> str:
    if endpoint.api_key_env is None:
        return ""
    key = environ.get(endpoint.api_key_env, "")
    if not key:
        raise ConfigError(
            f"endpoint {endpoint.base_url}: variable {endpoint.api_key_env} is empty; "
            "export it or drop api_key_env"
        )
    return key


class Router:
    """The chat client of one process: picks the least busy healthy endpoint, retries, times, prices."""

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        service_urls: Mapping[str, str],
        *,
        environ: Mapping[str, str] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`service_urls`: application of the Serve config -> its OpenAI base URL (`http://host:port/app/v1`)."""
        environ = os.environ if environ is None else environ
        self._rng = rng or random.Random()
        self._models = dict(models)
        self._routes = {
            name: [Route(item, endpoint_url(item, service_urls), environ) for item in model.endpoints]
            for name, model in models.items()
        }

    async def complete(self, request: ChatRequest) -> ChatReply:
        model = self._models[request.model]
        started = time.monotonic()
        try:
            async with asyncio.timeout(model.timeout_s):
                return await self._with_retries(request, model, started)
        except TimeoutError:
            urls = ", ".join(route.url for route in self._routes[request.model])
            raise EndpointError(
                f"model {request.model}: no complete answer from {urls} within {model.timeout_s:g} s"
            ) from None

    async def _with_retries(self, request: ChatRequest, model: ModelConfig, started: float) -> ChatReply:
        for attempt in range(MAX_TRIES):
            route = self._pick(request.model)
            route.in_flight += 1
            try:
                return await _stream(
                    route, request, model, queued_s=time.monotonic() - started, retries=attempt
                )
            except (openai.APIError, EndpointError) as error:
                fault = classify(error, route.url)
                if not isinstance(fault, EndpointError) or attempt == MAX_TRIES - 1:
                    raise _counted(fault, attempt) from None
                route.failed_at = time.monotonic()
                await asyncio.sleep(self._pause(attempt, error))
            finally:
                route.in_flight -= 1
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _pick(self, model: str) -> Route:
        now = time.monotonic()
        return min(self._routes[model], key=lambda r: (now - r.failed_at < COOL_DOWN_S, r.in_flight))

    def _pause(self, attempt: int, error: Exception) -> float:
        asked = _retry_after(error)
        backoff = min(BACKOFF_S * 2.0**attempt, MAX_BACKOFF_S) * self._rng.uniform(0.5, 1.5)
        return max(backoff, min(asked, MAX_BACKOFF_S))

    def routes(self) -> dict[str, list[str]]:
        """Model -> the URLs that may answer for it."""
        return {name: [route.url for route in routes] for name, routes in self._routes.items()}

    async def probe(self, model: str) -> str:
        """Ask every endpoint of `model` for its model list; "" when all answer, else what is wrong."""
        for route in self._routes[model]:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    listed = [item.id async for item in route.client.models.list()]
            except openai.NotFoundError:
                continue  # it answers, and lists no models
            except (openai.APIError, TimeoutError, httpx2.HTTPError, aiohttp.ClientError) as error:
                return f"{route.url}: {_one_line(error)}"
            name = self._models[model].served_name or model
            if name not in listed:
                return f"{route.url}: serves {', '.join(listed[:5]) or 'nothing'}, not {name}"
        return ""

    async def close(self) -> None:
        for routes in self._routes.values():
            for route in routes:
                await route.client.close()


def endpoint_url(endpoint: Endpoint, service_urls: Mapping[str, str]) -> str:
    if endpoint.base_url is not None:
        return endpoint.base_url
    if endpoint.service is None or endpoint.service not in service_urls:
        known = ", ".join(service_urls) or "none"
        raise ConfigError(
            f"endpoint service {endpoint.service!r}: no such application in the Serve config ({known})"
        )
    return service_urls[endpoint.service]


async def _stream(
    route: Route, request: ChatRequest, model: ModelConfig, *, queued_s: float, retries: int
) -> ChatReply:
    """One attempt, streamed so that the time to the first token and cancellation are real."""
    sent = time.monotonic()
    first: float | None = None
    content: list[str] = []
    calls: dict[int, dict[str, str]] = {}
    finish, usage, answered_as = "", None, ""
    try:
        stream = await route.client.chat.completions.create(**_body(request, model))
        async with stream:
            async for chunk in stream:
                first = time.monotonic() if first is None else first
                answered_as = chunk.model or answered_as
                usage = chunk.usage or usage
                for choice in chunk.choices[:1]:
                    finish = choice.finish_reason or finish
                    content.append(choice.delta.content or "")
                    _merge(calls, choice.delta.tool_calls or ())
    except (httpx2.HTTPError, aiohttp.ClientError, ValueError) as error:
        raise EndpointError(f"endpoint {route.url}: broken stream: {_one_line(error)}") from None
    if not finish:
        raise EndpointError(f"endpoint {route.url}: the stream ended in the middle of an answer")
    done = time.monotonic()
    counted = _usage(usage)
    reply = ChatReply(
        content="".join(content),
        tool_calls=tuple(ToolCall(c["id"], c["name"], c["arguments"]) for _, c in sorted(calls.items())),
        finish_reason=finish,
        usage=counted,
        model=answered_as or request.model,
        endpoint=route.url,
        queue_s=queued_s,
        prefill_s=(first or done) - sent,
        decode_s=done - (first or done),
        cost_usd=cost(counted, model),
        retries=retries,
    )
    if finish == "content_filter":
        refusal = Refusal(f"model {request.model}: the endpoint's content filter stopped the answer")
        refusal.reply = reply
        raise refusal
    return reply


def _merge(calls: dict[int, dict[str, str]], parts: Iterable[Any]) -> None:
    """Add the fragments of tool calls that one chunk carries to what has come so far."""
    for part in parts:
        call = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
        call["id"] += part.id or ""
        if part.function:
            call["name"] += part.function.name or ""
            call["arguments"] += part.function.arguments or ""


def _body(request: ChatRequest, model: ModelConfig) -> dict[str, Any]:
    sampling = request.sampling
    optional = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "tools": list(request.tools) or None,
        "extra_body": model.extra_body or None,
        "extra_headers": {"x-session-id": request.session} if request.session else None,
    }
    return {
        "model": model.served_name or request.model,
        "messages": [as_openai(message) for message in request.messages],
        model.token_limit_field: sampling.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **{key: value for key, value in optional.items() if value is not None},
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


def _usage(usage: Any) -> Usage:
    if usage is None:
        return Usage()
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens or 0) if details else 0
    return Usage(usage.prompt_tokens, usage.completion_tokens, cached)


def cost(usage: Usage, model: ModelConfig) -> float:
    """US dollars of one call at the model's prices (dollars per million tokens); 0 where it has none."""
    price = model.price or Price()
    cached_price = price.input if price.cached_input is None else price.cached_input
    fresh = usage.prompt_tokens - usage.cached_tokens
    total = fresh * price.input + usage.cached_tokens * cached_price + usage.completion_tokens * price.output
    return total / 1e6


def _counted(fault: Exception, retries: int) -> Exception:
    fault.retries = retries  # type: ignore[attr-defined]  # read by the journal's error event
    return fault


def classify(error: Exception, url: str) -> Exception:
    """The typed form of an SDK error: terminal (ContextOverflow, Refusal) or worth another try."""
    if isinstance(error, EndpointError):
        return error
    text = _one_line(error)
    if not isinstance(error, openai.APIStatusError):
        return EndpointError(f"endpoint {url}: {text}")
    code = str(error.code or "")
    if error.status_code in {400, 413} and (
        code in OVERFLOW_CODES or any(words in text.lower() for words in OVERFLOW_WORDS)
    ):
        return ContextOverflow(f"endpoint {url}: {text}")
    if code in UNSUPPORTED_CODES:
        # What we send, not what is asked: the user mends the config, and every task may run again.
        return AccessDenied(f"endpoint {url}: {text}; set token_limit_field or sampling in the config")
    if error.status_code in {400, 413, 422}:
        return Refusal(f"endpoint {url}: HTTP {error.status_code}: {text}")
    if error.status_code in {401, 403, 404}:
        return AccessDenied(f"endpoint {url}: HTTP {error.status_code}: {text}")
    return EndpointError(f"endpoint {url}: HTTP {error.status_code}: {text}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__
    return f"{text} ({' '.join(str(cause).split())})"[:500] if cause and str(cause) else text[:500]


def _retry_after(error: Exception) -> float:
    if not isinstance(error, openai.APIStatusError):
        return 0.0
    try:
        return float(error.response.headers.get("retry-after", 0))
    except ValueError:
        return 0.0
