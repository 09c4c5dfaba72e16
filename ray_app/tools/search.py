"""`search`: an expert writes one query, the retriever answers it inside the task's scope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ray_app import extract
from ray_app.config import Alias, Retriever, ToolName
from ray_app.errors import ToolError
from ray_app.journal import RETRIEVAL, Journal
from ray_app.prompting import Prompts
from ray_app.records import Message, Retrieval, Task
from ray_app.tools.base import Answer, Caller
from ray_app.workspace import Workspace


class DocumentSource(Protocol):
    async def retrieve(self, query: str, *, scope_id: str | None, top_k: int) -> Retrieval:
        """The hits, best first, and what they cost. Raises RetrieverError when it cannot answer."""
        ...


@dataclass(frozen=True)
class Search:
    aliases: Mapping[str, Alias]
    caller: Caller
    prompts: Prompts
    source: DocumentSource
    config: Retriever
    name: ToolName = "search"
    purpose: str = "Find documents that hold a fact which is still missing."

    async def use(self, alias: str, task: Task, space: Workspace, journal: Journal) -> Answer | None:
        query = await self._query(self.aliases[alias], task, space, journal)
        if len(query) < self.config.min_query_chars:
            raise ToolError(f"search with {alias} wrote no usable query ({query!r})")
        scope_id = task.task_id if task.scope is not None else None
        asked = [query, scope_id, self.config.top_k]
        found = await journal.call(
            RETRIEVAL,
            asked,
            lambda: self.source.retrieve(query, scope_id=scope_id, top_k=self.config.top_k),
        )
        if not space.add_hits(found.hits):
            raise ToolError(f"search found no new document for {query!r}")
        return None

    async def _query(self, alias: Alias, task: Task, space: Workspace, journal: Journal) -> str:
        def write(context: str) -> tuple[Message, ...]:
            text = self.prompts.render("search", context=context, question=task.question)
            return (Message("user", text, self.caller.images(alias.model, task)),)

        reply = await self.caller.ask_expert(journal, alias, task, space, write)
        written = extract.tagged(reply.content, "query")
        query = extract.without_thinking(reply.content) if written is None else written
        return " ".join((query or task.question).split())[: self.config.query_chars]
