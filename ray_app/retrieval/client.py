"""The retriever as an actor sees it: calls by Serve handle, with the one retry layer.

Owns the time limit, the translation of Ray's failures into ours, and the groups: what coroutines of one
process ask within one turn of their event loop travels as one call, because a call of a handle costs more
than the search of a query may. Nobody waits for a group to fill, and each answer comes as soon as the
retriever has it. Holds no connection until the first call, so it may be made anywhere and sent to an actor.
"""

from __future__ import annotations

import asyncio
import pickle
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from ray_app.errors import EvalError, RetrieverError
from ray_app.records import Retrieval
from ray_app.retrieval import group_wire
from ray_app.retrieval.batcher import QueueFull
from ray_app.retrieval.search import Query

ATTEMPTS = 3
BACKOFF_S = 0.5
MAX_GROUP = 256

T = TypeVar("T")
Asked = tuple[Query, asyncio.Future[Retrieval]]


class HandleRetriever:
    """A Retriever over the Serve application `app_name`, for the coroutines of one event loop.

    `timeout_s` holds for each of the three attempts, and for asking a retriever again whose queue is full;
    `on_retry` is told what each repeat answers to.
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
        self._asked: list[Asked] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def retrieve(self, query: str, scope_id: str | None, top_k: int) -> Retrieval:
        """Hits, best first, and what the web cost.

        Raises BadQuery or UnknownScope at once, RetrieverError after the last attempt.
        """
        return await self._retrying(lambda: self._ask(Query(query, scope_id, top_k)))

    async def info(self) -> dict[str, str]:
        """What the service says it is. Raises RetrieverError when it cannot be asked."""
        info: dict[str, str] = await self._retrying(lambda: self._call("info"))
        return info

    async def unknown_scopes(self, question_ids: list[str]) -> list[str]:
        """Those of `question_ids` that the service would refuse to search for."""
        unknown: list[str] = await self._retrying(lambda: self._call("unknown_scopes", question_ids))
        return unknown

    async def _retrying(self, call: Callable[[], Awaitable[T]]) -> T:
        failed, give_up = 0, time.monotonic() + self._timeout_s
        while True:
            try:
                return await self._once(call)
            except RetrieverError as error:
                # A full queue is no failure: it empties at the speed of the encoder.
                is_full = isinstance(error, QueueFull) and time.monotonic() < give_up
                failed += not is_full
                if failed >= ATTEMPTS:
                    raise
                self._on_retry(error)
            # Spread out, so that callers turned away together do not come back together.
            await asyncio.sleep(BACKOFF_S * 2 ** max(0, failed - 1) * random.uniform(0.5, 1.5))

    async def _once(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call()
        except TimeoutError:
            self._handle = None  # it may wait for an application that is gone
            raise RetrieverError(
                f"retriever {self._app_name!r} did not answer in {self._timeout_s:g} s"
            ) from None

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(await self._connected(), method).remote(*arguments)
        except (RayServeException, RayError) as error:
            raise self._translated(error) from error

    async def _connected(self) -> Any:
        if self._handle is None:
            # Asks the controller and blocks meanwhile, hence the thread.
            self._handle = await asyncio.to_thread(serve.get_app_handle, self._app_name)
        return self._handle

    def _ask(self, query: Query) -> asyncio.Future[Retrieval]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Retrieval] = loop.create_future()
        self._asked.append((query, answer))
        if len(self._asked) == 1:
            loop.call_soon(self._send)
        return answer

    def _send(self) -> None:
        asked, self._asked = self._asked, []
        for start in range(0, len(asked), MAX_GROUP):
            group = _Group(asked[start : start + MAX_GROUP])
            task = asyncio.create_task(self._answer(group))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            group.when_nobody_waits(task.cancel)

    async def _answer(self, group: _Group) -> None:
        call = None
        try:
            handle = await self._connected()
            queries = pickle.dumps([(query.text, query.scope_id, query.top_k) for query, _ in group.asked])
            if len(group.asked) == 1:  # a stream of one costs a third of a millisecond more
                call = handle.retrieve_one.remote(queries)
                group.settle(group_wire.unpacked(await call))
            else:
                call = handle.options(stream=True).retrieve_group.remote(queries)
                async for part in call:
                    group.settle(group_wire.unpacked(part))
            group.fail(RetrieverError(f"retriever {self._app_name!r} left a query without an answer"))
        except (RayServeException, RayError) as error:
            group.fail(self._translated(error))
        except asyncio.CancelledError:  # nobody waits any more: the retriever need not encode it
            if call is not None:
                call.cancel()
            group.fail(RetrieverError(f"retriever {self._app_name!r}: the call was cancelled"))
            raise
        except Exception as error:
            group.fail(self._failed(error))

    def _translated(self, error: Any) -> EvalError:
        if not isinstance(error, RayTaskError):
            self._handle = None  # it may point at an application that is gone
            return self._failed(error)
        cause = error.cause
        # Ray's wrapper is both its own class and the cause's, with a traceback as message.
        return type(cause)(str(cause)) if isinstance(cause, EvalError) else self._failed(cause)

    def _failed(self, error: BaseException) -> RetrieverError:
        reason = str(error).strip().split("\n", 1)[0]
        return RetrieverError(f"retriever {self._app_name!r} failed: {type(error).__name__}: {reason}")


class _Group:
    """Queries that travel together, and the futures of those who wait for them."""

    def __init__(self, asked: list[Asked]) -> None:
        self.asked = asked
        self._unanswered = set(range(len(asked)))

    def settle(self, answers: Iterable[group_wire.Answered]) -> None:
        for position, answer in answers:
            self._unanswered.discard(position)
            future = self.asked[position][1]
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def fail(self, error: EvalError) -> None:
        """Whatever has no answer yet has this one."""
        self.settle([(position, error) for position in self._unanswered])

    def when_nobody_waits(self, call: Callable[[], object]) -> None:
        """Calls once the last of those who have no answer has given up."""

        def look(future: asyncio.Future[Retrieval]) -> None:
            if future.cancelled() and all(self.asked[position][1].done() for position in self._unanswered):
                call()

        for _, future in self.asked:
            future.add_done_callback(look)
