"""One endpoint of one model: its address, its key, its open calls, its health, and one attempt at a call.

The key is read from the variable that the config names, sent to this endpoint alone, and cut out of what the
endpoint says. A proxy of the environment is for the outside, never for our own services on loopback.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from ray_app import faults
from ray_app.completion import Completion, Whole
from ray_app.config import Endpoint
from ray_app.errors import ConfigError, EndpointError
from ray_app.faults import Fault, malformed
from ray_app.slots import RouteKey, Slots
from ray_app.sse import EventParser

# An endpoint is left alone for a while that cannot be reached or refuses its key, failed this often in a row,
# or denied so many tasks.
FAULTS_IN_A_ROW = 3
COOL_DOWN_S = 10.0
MAX_ERROR_BYTES = 64 << 10
# What follows the last event of a stream is its end; a connection where that does not come is not used again.
END_WAIT_S = 0.25
# The timer of a stream is not set anew for each packet, but after this share of its time.
TIMER_SHARE = 1 / 16


class TimeLimits(NamedTuple):
    """Of one attempt, on the event loop's clock: when all must be over, and how long nothing may come."""

    deadline: float
    first_byte_s: float | None
    stall_s: float


@dataclass(frozen=True, slots=True)
class Answered:
    """A complete answer, and when (monotonic seconds) it was asked for, began and ended."""

    answer: Whole
    sent: float
    first: float
    done: float


class Route:
    """One endpoint of one model."""

    def __init__(self, model: str, endpoint: Endpoint, url: str, environ: Mapping[str, str]) -> None:
        self.key = RouteKey(model, url)
        self.slots = Slots()
        self.open = 0
        self.answering = 0  # calls that it has taken and not ended
        self._faults = 0
        self._denied = set[str]()  # sessions, since it last answered
        self._out_until = float("-inf")
        self._chat_url = _address(url, "/chat/completions")
        self._models_url = _address(url, "/models")
        self._proxy = _proxy(url)
        self._secret = _secret(endpoint, environ)
        self._headers = {"accept-encoding": "identity"}
        if self._secret:
            self._headers["authorization"] = f"Bearer {self._secret}"
        self._chat_headers = {**self._headers, "content-type": "application/json"}

    @property
    def url(self) -> str:
        return self.key.url

    @property
    def is_healthy(self) -> bool:
        return time.monotonic() >= self._out_until

    def answered(self) -> None:
        """It works, whatever it said."""
        self._faults, self._out_until = 0, float("-inf")
        self._denied.clear()
        self.slots.refusal = self.slots.denial = ""
        self.slots.answered_at = time.monotonic()

    @property
    def is_denying(self) -> bool:
        """Whether it denies calls whatever they ask: those of several tasks, and it answered none since."""
        return len(self._denied) >= FAULTS_IN_A_ROW

    def failed(self, fault: Fault, session: str = "") -> None:
        """A fault that says something of the endpoint. That it has too much to do now does not."""
        if fault.is_denial:
            self._denied.add(session)
            if fault.name == "401" or self.is_denying:
                self._out_until = time.monotonic() + COOL_DOWN_S
        elif not fault.is_passing:
            self.answered()
        elif fault.name != "429":
            self._faults += 1
            if fault.name == "connect" or self._faults >= FAULTS_IN_A_ROW:
                self._out_until = time.monotonic() + COOL_DOWN_S

    async def ask(
        self, http: aiohttp.ClientSession, body: bytes, session: str, limits: TimeLimits
    ) -> Answered:
        """One attempt, streamed: the time to the first token and cancellation are real. Raises Fault."""
        headers = {**self._chat_headers, "x-session-id": session} if session else self._chat_headers
        loop = asyncio.get_running_loop()
        sent = loop.time()
        patience = float("inf") if limits.first_byte_s is None else sent + limits.first_byte_s
        reader = _Reader(self, limits)
        try:
            async with (
                asyncio.timeout_at(min(limits.deadline, patience)) as timer,
                http.post(
                    self._chat_url, data=body, headers=headers, proxy=self._proxy, allow_redirects=False
                ) as reply,
            ):
                if reply.status != 200:
                    raise await self._refused(reply)
                first = await self._read(reader, reply, timer)
                answer = reader.whole()
        except Fault as fault:
            raise self._discreet(fault) from None
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            if timer.expired():
                raise reader.late(sent, loop.time()) from None
            raise faults.of_connection(error, self.url) from None
        done = loop.time()
        return Answered(answer, sent, first or done, done)

    async def listed(self, http: aiohttp.ClientSession, timeout_s: float) -> list[Mapping[str, Any]] | None:
        """What `/models` lists; None where the endpoint has no such list. Raises Fault."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                http.get(
                    self._models_url, headers=self._headers, proxy=self._proxy, allow_redirects=False
                ) as reply,
            ):
                if reply.status in {404, 405}:
                    return None
                if reply.status != 200:
                    raise self._discreet(await self._refused(reply))
                listed = json.loads(await reply.read())
                return [item for item in listed["data"] if isinstance(item, Mapping)]
        except TimeoutError:
            error = EndpointError(f"endpoint {self.url}: no answer within {timeout_s:g} s")
            raise Fault("timeout", error) from None
        except (aiohttp.ClientError, OSError) as error:
            raise faults.of_connection(error, self.url) from None
        except (ValueError, KeyError, TypeError) as error:
            raise malformed(self.url, f"no list of models ({faults.one_line(error)})") from None

    async def _read(
        self, reader: _Reader, reply: aiohttp.ClientResponse, timer: asyncio.Timeout
    ) -> float | None:
        self.answering += 1
        try:
            return await reader.read(reply, timer)
        finally:
            self.answering -= 1

    async def _refused(self, reply: aiohttp.ClientResponse) -> Fault:
        body = bytearray()
        while len(body) < MAX_ERROR_BYTES and (packet := await reply.content.readany()):
            body += packet
        said = faults.complaint(bytes(body))
        return faults.classify(reply.status, said, self.url, reply.headers)

    def _discreet(self, fault: Fault) -> Fault:
        """Without the key, which some services repeat when they refuse it."""
        if self._secret and self._secret in str(fault.error):
            fault.error = type(fault.error)(str(fault.error).replace(self._secret, "***"))
        return fault


class _Reader:
    """Reads one answer."""

    def __init__(self, route: Route, limits: TimeLimits) -> None:
        self._answer = Completion()
        self._url = route.url
        self._limits = limits
        self._has_begun = False

    async def read(self, reply: aiohttp.ClientResponse, timer: asyncio.Timeout) -> float | None:
        """Read to the end. Returns when the first token came; None where none did."""
        kind = reply.content_type
        if kind.endswith("json"):
            self._take([await reply.read()])
            return None
        if not kind.startswith("text/event-stream") and kind != "application/octet-stream":
            raise malformed(self._url, f"expected an event stream, got {kind}")
        return await self._stream(reply.content, timer)

    async def _stream(self, content: aiohttp.StreamReader, timer: asyncio.Timeout) -> float | None:
        parser, first = EventParser(), None
        now = asyncio.get_running_loop().time
        deadline, stall_s = self._limits.deadline, self._limits.stall_s
        set_anew = float("-inf")
        try:
            while packet := await content.readany():
                self._has_begun = True
                came = now()
                if came >= set_anew:
                    timer.reschedule(min(deadline, came + stall_s))
                    set_anew = came + stall_s * TIMER_SHARE
                has_token, is_done = self._take(parser.feed(packet))
                if has_token and first is None:
                    first = came
                if is_done:
                    await _end(content)
                    return first
            self._take(parser.close())
        except ValueError as error:
            raise malformed(self._url, error) from None
        return first

    def _take(self, events: Iterable[bytes]) -> tuple[bool, bool]:
        """Take in the events of one packet: whether one carries a token, and whether one is the last."""
        has_token = False
        for data in events:
            if data == b"[DONE]":
                return has_token, True
            try:
                chunk = json.loads(str(data, "utf-8"))
                if error := chunk.get("error"):
                    raise faults.of_stream(faults.complaint({"error": error}), self._url)
                if chunk.get("object") == "error":
                    raise faults.of_stream(faults.complaint(chunk), self._url)
                has_token = self._answer.add(chunk) or has_token
            except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
                raise malformed(self._url, error) from None
        return has_token, False

    def whole(self) -> Whole:
        """The answer. Raises Fault for one that is not whole."""
        answer = self._answer
        if not answer.has_choice:
            raise Fault("empty", EndpointError(f"endpoint {self._url}: an answer without a choice"))
        if not answer.finish_reason:
            cut = EndpointError(f"endpoint {self._url}: the stream ended in the middle of an answer")
            raise Fault("truncated", cut)
        try:
            return answer.whole()
        except (ValueError, TypeError, AttributeError) as error:
            raise malformed(self._url, error) from None

    def late(self, sent: float, now: float) -> Fault:
        waited_s = now - sent
        if self._has_begun and now >= self._limits.deadline:
            cut = f"endpoint {self._url}: an answer that was not complete after {waited_s:.3g} s"
            return Fault("timeout", EndpointError(cut))
        if self._has_begun:
            stood = f"endpoint {self._url}: the stream stood still for {self._limits.stall_s:g} s"
            return Fault("stall", EndpointError(stood))
        return Fault("timeout", EndpointError(f"endpoint {self._url}: no answer within {waited_s:.3g} s"))


async def _end(content: aiohttp.StreamReader) -> None:
    """Wait a moment for the end of a stream whose last event has come: its connection is then used again."""
    if content.is_eof():
        return
    with suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(END_WAIT_S):
            while await content.readany():
                pass


def _address(url: str, path: str) -> URL:
    try:
        address = URL(url.rstrip("/") + path)
    except ValueError:
        address = URL()
    if address.scheme not in {"http", "https"} or not address.host:
        raise ConfigError(f"endpoint {url!r}: expected a base URL such as http://127.0.0.1:8000/v1")
    if address.user is not None or address.password is not None:
        shown = address.with_user(None)
        raise ConfigError(
            f"endpoint {shown}: a key in the address would be logged; name its variable as api_key_env"
        )
    if "?" in url or "#" in url:
        raise ConfigError(f"endpoint {url.partition('?')[0]}: expected a base URL without ? and #")
    return address


def _secret(endpoint: Endpoint, environ: Mapping[str, str]) -> str:
    if endpoint.api_key_env is None:
        return ""
    key = environ.get(endpoint.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"endpoint {endpoint.base_url}: variable {endpoint.api_key_env} is empty; "
            "export it or drop api_key_env"
        )
    if not key.isprintable():
        raise ConfigError(
            f"endpoint {endpoint.base_url}: variable {endpoint.api_key_env} has a line break or another "
            "control character in it; export the key alone"
        )
    return key


def _proxy(url: str) -> str | None:
    """The environment's proxy for `url`, looked up once; None for our own services."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host == "localhost" or host.startswith("127.") or host == "::1":
        return None
    return None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)


def endpoint_url(endpoint: Endpoint, service_urls: Mapping[str, str]) -> str:
    """Its base URL, that of the Serve application where it names one. Raises ConfigError."""
    if endpoint.base_url is not None:
        return endpoint.base_url
    if endpoint.service is None or endpoint.service not in service_urls:
        known = ", ".join(service_urls) or "none"
        raise ConfigError(
            f"endpoint service {endpoint.service!r}: no such application in the Serve config ({known})"
        )
    return service_urls[endpoint.service]
