"""What can go wrong with one attempt at a model call: its name, and the error that it is.

EndpointError means that another attempt may go better; every other class is terminal. A refusal is an
attempt that the endpoint did not take: it cost nothing, and says only that the call has to wait. A denial is
about the endpoint and our key to it, so another endpoint may take the call. Names are short, so that the
event log can list what a call met: an HTTP status ("429"), or one of

    connect     no connection              stall      the stream stood still
    reset       cut while it was used      truncated  ended before the answer did
    timeout     no first byte, or no end   malformed  no JSON, or not of this protocol
    empty       no choice in the answer    error      an error in mid-stream, without a status
"""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import aiohttp

from ray_app.errors import AccessDenied, ContextOverflow, EndpointError, EvalError, Refusal
from ray_app.slots import Ending

CONGESTED = frozenset({"429", "503", "timeout", "stall"})
# Too many requests, nobody there (as a proxy says it), not now, overloaded: before anything was begun.
REFUSED_STATUS = frozenset({429, 502, 503, 529})
ABSENT = frozenset({"connect", "502"})
# Seconds; what an endpoint asks for beyond this is not waited for.
MAX_RETRY_AFTER_S = 60.0

OVERFLOW_CODES = ("context_length_exceeded", "string_above_max_length")
UNSUPPORTED_CODES = ("unsupported_parameter", "unsupported_value")
OVERFLOW_WORDS = (
    "maximum context length",
    "context length",
    "maximum model length",
    "max_model_len",
    "too many tokens",
)
RETRIED_STATUS = frozenset({408, 409, 425, 429})


class Fault(Exception):
    """One attempt failed. `error` is what the caller gets where no other attempt is made."""

    def __init__(
        self,
        name: str,
        error: EvalError,
        retry_after_s: float = 0.0,
        *,
        is_refusal: bool = False,
        is_of_request: bool = False,
    ) -> None:
        super().__init__(str(error))
        self.name = name
        self.error = error
        self.retry_after_s = retry_after_s
        self.is_refusal = is_refusal
        self.is_of_request = is_of_request

    @property
    def is_passing(self) -> bool:
        """Whether another attempt may go better."""
        return isinstance(self.error, EndpointError)

    @property
    def is_denial(self) -> bool:
        """Whether this endpoint answers nobody with our key, or has no such model."""
        return isinstance(self.error, AccessDenied) and not self.is_of_request

    @property
    def is_of_absence(self) -> bool:
        """Whether nobody was there to take the attempt."""
        return self.name in ABSENT

    @property
    def ending(self) -> Ending:
        return "congested" if self.name in CONGESTED else "broken"


class Complaint(NamedTuple):
    """What an endpoint says about a request that it did not answer."""

    message: str
    code: str = ""


def classify(status: int, said: Complaint, url: str, headers: Mapping[str, str]) -> Fault:
    """The fault that an HTTP status (or one that a stream names in its middle) means."""
    message, code = said
    about = f"endpoint {url}: HTTP {status}: {message}"
    if status in {400, 413, 422} and _is_overflow(said):
        return Fault(str(status), ContextOverflow(about))
    if code in UNSUPPORTED_CODES:
        # What we send, not what is asked: the user mends the config, and every task may run again.
        hint = "set token_limit_field or sampling in the config"
        return Fault(str(status), AccessDenied(f"{about}; {hint}"), is_of_request=True)
    if code == "insufficient_quota":  # comes as 429, and waiting does not mend it
        return Fault(str(status), AccessDenied(about))
    if status in {400, 413, 422}:
        refused = f"{about} (code {code})" if code == "content_filter" else about
        return Fault(str(status), Refusal(refused))
    if status >= 500 or status in RETRIED_STATUS:
        wait_s = _retry_after_s(headers, _now(headers))
        return Fault(str(status), EndpointError(about), wait_s, is_refusal=status in REFUSED_STATUS)
    if 300 <= status < 400:
        # Followed, it would be unknown who answered, and who got the key.
        where = headers.get("location", "elsewhere")
        return Fault(str(status), AccessDenied(f"{about}; it redirects to {where}: name that in the config"))
    return Fault(str(status), AccessDenied(about))


def of_connection(error: Exception, url: str) -> Fault:
    """The fault that an error of the transport means."""
    text = one_line(error)
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ServerTimeoutError):
        return Fault("connect", EndpointError(f"endpoint {url}: no connection: {text}"), is_refusal=True)
    return Fault("reset", EndpointError(f"endpoint {url}: broken connection: {text}"))


def of_stream(said: Complaint, url: str) -> Fault:
    """The fault that an error object in the middle of a stream means; its code may be an HTTP status."""
    if said.code.isdecimal() and 400 <= int(said.code) < 600:
        fault = classify(int(said.code), said, url, {})
        fault.is_refusal = False  # it took the call, and what was done of it may be paid for
        return fault
    if _is_overflow(said):
        return Fault("error", ContextOverflow(f"endpoint {url}: {said.message}"))
    if said.code == "content_filter":
        return Fault("error", Refusal(f"endpoint {url}: {said.message} (code {said.code})"))
    return Fault("error", EndpointError(f"endpoint {url}: error in mid-stream: {said.message}"))


def malformed(url: str, what: object) -> Fault:
    text = one_line(what) if isinstance(what, Exception) else str(what)
    return Fault("malformed", EndpointError(f"endpoint {url}: broken stream: {text}"))


def complaint(body: bytes | Mapping[str, Any]) -> Complaint:
    """What an error body says: `{"error": {"message", "code"}}` in its several dialects, or plain text."""
    value: Any = body
    if isinstance(body, bytes):
        try:
            value = json.loads(body)
        except ValueError:
            return Complaint(" ".join(body.decode("utf-8", "replace").split())[:500] or "no message")
    error = value.get("error", value) if isinstance(value, Mapping) else value
    if not isinstance(error, Mapping):
        return Complaint(" ".join(str(error).split())[:500])
    said = error.get("message") or error.get("detail") or json.dumps(error, default=str)
    code = error.get("code")
    return Complaint(" ".join(str(said).split())[:500], "" if code is None else str(code))


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _is_overflow(said: Complaint) -> bool:
    text = said.message.lower()
    return said.code in OVERFLOW_CODES or any(words in text for words in OVERFLOW_WORDS)


def _retry_after_s(headers: Mapping[str, str], now: float) -> float:
    """Seconds that the `Retry-After` header asks for (a number, or an HTTP date), at most the maximum."""
    asked = headers.get("retry-after", "")
    try:
        seconds = float(asked)
    except ValueError:
        seconds = _time_of(asked, now) - now
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S)  # in this order, what is no number is 0


def _now(headers: Mapping[str, str]) -> float:
    """The time of who answers: its clock and ours may be hours apart."""
    return _time_of(headers.get("date", ""), time.time())


def _time_of(date: str, otherwise: float) -> float:
    try:
        parts = email.utils.parsedate_tz(date)
        return email.utils.mktime_tz(parts) if parts else otherwise
    except (ValueError, OverflowError):  # a date that no calendar has
        return otherwise
