"""The retriever as an actor sees it: a call by Serve handle, with the one retry layer.

Owns the time limit and the translation of Ray's failures into ours. Holds no connection until the
first call, so it may be made anywhere and sent to an actor.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from ray_app.errors import EvalError, RetrieverError
from ray_app.records import Hit

ATTEMPTS = 3
BACKOFF_S = 0.5

T = TypeVar("T")


class HandleRetriever:
    """A Retriever over the Serve application `app_name`.

    `timeout_s` holds for each of the three attempts; `on_retry` is told what each repeat answers to.
    """

    def __init__(
        self,
        app_name: str,
        timeout_s: float = 60.0,
        on_retry: Callable[[RetrieverError], None] = lambda error: None,
    ) -> None:
        self._app_name = app_name
        self._timeout_s = timeout_s
        self._on_retry = on_retry
        self._handle: Any = None

    async def retrieve(self, query: str, scope_id: str | None, top_k: int) -> list[Hit]:
        """Hits, best first.

        Raises BadQuery or UnknownScope at once, RetrieverError after the last attempt.
        """
        hits: list[Hit] = await self._retrying(
            lambda handle: handle.retrieve.remote(query, scope_id=scope_id, top_k=top_k)
        )
        return hits

    async def info(self) -> dict[str, str]:
        """What the service says it is. Raises RetrieverError when it cannot be asked."""
        info: dict[str, str] = await self._retrying(lambda handle: handle.info.remote())
        return info

    async def unknown_scopes(self, question_ids: list[str]) -> list[str]:
        """Those of `question_ids` that the service would refuse to search for."""
        unknown: list[str] = await self._retrying(lambda handle: handle.unknown_scopes.remote(question_ids))
        return unknown

    async def _retrying(self, call: Callable[[Any], Awaitable[T]]) -> T:
        for attempt in range(1, ATTEMPTS):
            try:
                return await self._once(call)
            except RetrieverError as error:
                self._on_retry(error)
            # Spread out, so that callers turned away together do not come back together.
            await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        return await self._once(call)

    async def _once(self, call: Callable[[Any], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._handle is None:
                    # Asks the controller and blocks meanwhile, hence the thread.
                    self._handle = await asyncio.to_thread(serve.get_app_handle, self._app_name)
                return await call(self._handle)
        except TimeoutError:
            raise RetrieverError(
                f"retriever {self._app_name!r} did not answer in {self._timeout_s:g} s"
            ) from None
        except RayTaskError as error:
            raise self._translate(error) from error
        except (RayServeException, RayError) as error:
            self._handle = None  # it may point at an application that is gone
            raise self._failed(error) from error

    def _translate(self, error: Any) -> EvalError:
        cause = error.cause
        # Ray's wrapper is both its own class and the cause's, with a traceback as message.
        return type(cause)(str(cause)) if isinstance(cause, EvalError) else self._failed(cause)

    def _failed(self, error: BaseException) -> RetrieverError:
        reason = str(error).strip().split("\n", 1)[0]
        return RetrieverError(f"retriever {self._app_name!r} failed: {type(error).__name__}: {reason}")
