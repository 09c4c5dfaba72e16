"""Which of a model's endpoints a call goes to.

The turns of a task stay together, so that the endpoint's prefix cache helps: a session has a home. It is the
endpoint that ranks first for it by rendezvous hashing, so that other processes and a resume choose the same
and one more of n endpoints moves few sessions; but one that has much more than its share of open calls is
passed over. A home is left for good only when it is unhealthy.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

# Sessions whose home is remembered; many more than a process has tasks in flight.
MAX_HOMES = 16_384
# A home takes no new session while it has this many times its share of the open calls.
HEADROOM = 1.25


class Target(Protocol):
    """An endpoint as far as the choice is concerned."""

    @property
    def url(self) -> str: ...

    @property
    def open(self) -> int:
        """Calls of this process that wait for it or are under way."""
        ...

    @property
    def is_healthy(self) -> bool: ...


T = TypeVar("T", bound=Target)


class Homes:
    """The homes of one model's sessions."""

    def __init__(self) -> None:
        self._homes: OrderedDict[str, str] = OrderedDict()

    def pick(self, session: str, targets: Sequence[T], failed: Collection[str] = ()) -> T:
        """The target for a call of `session` ("": none), which failed at the URLs in `failed` already."""
        usable = [target for target in targets if target.is_healthy] or list(targets)
        fresh = [target for target in usable if target.url not in failed] or usable
        if not session:
            return min(fresh, key=lambda target: target.open)
        if len(targets) == 1:
            return targets[0]
        home = self._homes.get(session)
        for target in fresh:
            if target.url == home:
                self._homes.move_to_end(session)
                return target
        chosen = first_choice(session, fresh)
        if home is None or all(target.url != home for target in usable):
            self._remember(session, chosen.url)
        return chosen

    def _remember(self, session: str, url: str) -> None:
        self._homes[session] = url
        self._homes.move_to_end(session)
        if len(self._homes) > MAX_HOMES:
            self._homes.popitem(last=False)


def first_choice(session: str, targets: Sequence[T]) -> T:
    """The first by rank that would have at most HEADROOM times its share of the open calls."""
    share = (sum(target.open for target in targets) + 1) / len(targets)
    room = max(int(HEADROOM * share), math.ceil(share))  # so that one of them has room
    ranked = sorted(targets, key=lambda target: _rank(session, target.url))
    return next(target for target in ranked if target.open < room)


def _rank(session: str, url: str) -> bytes:
    return hashlib.blake2b(f"{session}\n{url}".encode("utf-8", "replace"), digest_size=8).digest()
