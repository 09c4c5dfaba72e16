"""The connections of one process to model endpoints: one bounded pool, which all routes share."""

from __future__ import annotations

import resource

import aiohttp

MAX_CONNECTIONS = 2048
# Descriptors that the rest of the process may need: files, sockets of Ray, pipes of sandboxes.
SPARE_DESCRIPTORS = 256
CONNECT_TIMEOUT_S = 10.0
# Less than what common servers keep an idle connection (uvicorn: 5 s), so that theirs is not the first move.
KEEPALIVE_S = 4.0


class Connections:
    """A pool of at most `limit` connections, opened with the first call; more calls than that wait."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit or _affordable()
        self._session: aiohttp.ClientSession | None = None

    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = new_session(self._limit)
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


def new_session(limit: int) -> aiohttp.ClientSession:
    """Without cookies, proxies or passwords from the environment, and with no time limit but to connect."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=limit, keepalive_timeout=KEEPALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        trust_env=False,
    )


def _affordable() -> int:
    """As many as may be open beside the rest of this process, whatever `ulimit -n` says."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(min(MAX_CONNECTIONS, soft - SPARE_DESCRIPTORS), 64)
