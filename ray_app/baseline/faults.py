"""How slow and how broken the baseline server pretends to be, so that a client's patience can be tested.

Every draw is seeded by the request's digest, and faults by its attempt too: a run repeats exactly, and a
retry of a failed request may succeed. Attempts are counted per process: two replicas count apart.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fault = Literal["http_429", "http_500", "hang", "empty", "malformed_tool_call"]
FAULTS: tuple[Fault, ...] = ("http_429", "http_500", "hang", "empty", "malformed_tool_call")
REMEMBERED_REQUESTS = 20_000


class Settings(BaseModel):
    """Unknown keys are errors; values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Latency(Settings):
    """Seconds a reply takes: lognormal with this mean; `sigma` is the spread of the logarithm."""

    mean_s: float = Field(0.0, ge=0)
    sigma: float = Field(0.5, ge=0)

    def draw_s(self, request_digest: str) -> float:
        """The same for equal requests; 0 where the mean is 0."""
        if self.mean_s == 0:
            return 0.0
        mu = math.log(self.mean_s) - self.sigma**2 / 2
        return random.Random(f"latency {request_digest}").lognormvariate(mu, self.sigma)


class Failures(Settings):
    """The share of requests, 0 to 1, that fail in each way; the rest are answered.

    `hang` gives no byte for `hang_s`, or until the client leaves. `malformed_tool_call` sends arguments that
    are not JSON, and `empty` a reply without text or calls.
    """

    http_429: float = Field(0.0, ge=0, le=1)
    http_500: float = Field(0.0, ge=0, le=1)
    hang: float = Field(0.0, ge=0, le=1)
    empty: float = Field(0.0, ge=0, le=1)
    malformed_tool_call: float = Field(0.0, ge=0, le=1)
    retry_after_s: int = Field(1, ge=0)
    hang_s: float = Field(3600.0, gt=0)

    @model_validator(mode="after")
    def _rates_fit(self) -> Self:
        total = sum(self.rate(fault) for fault in FAULTS)
        if total > 1 + 1e-9:
            raise ValueError(f"the rates sum to {total:g}, expected at most 1")
        return self

    def rate(self, fault: Fault) -> float:
        return float(getattr(self, fault))

    def draw(self, request_digest: str, attempt: int) -> Fault | None:
        """What goes wrong with this attempt, or None."""
        left = random.Random(f"fault {request_digest} {attempt}").random()
        for fault in FAULTS:
            left -= self.rate(fault)
            if left < 0:
                return fault
        return None


class Attempts:
    """How often each request has come, over the last 20,000 different ones."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, int] = OrderedDict()

    def next(self, request_digest: str) -> int:
        """0 for a request not seen before."""
        attempt = self._seen.pop(request_digest, 0)
        self._seen[request_digest] = attempt + 1
        if len(self._seen) > REMEMBERED_REQUESTS:
            self._seen.popitem(last=False)
        return attempt
