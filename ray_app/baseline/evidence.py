"""Which documents and sentences bear on a question, and how well they support an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from ray_app.baseline.language import content_words, coverage, sentences, weights
from ray_app.baseline.prompt import Document

NAMED_BONUS = 1.0
TAIL_BONUS = 0.5
MODULE_BONUS = 0.15
TOP_DOCUMENTS = 3
SUPPORT_OF_NAME = 0.3


class Ranked(NamedTuple):
    document: Document
    score: float


class Sentence(NamedTuple):
    """A sentence, the document that holds it, and the share of the question's words in both."""

    text: str
    document: Document
    score: float


class Evidence:
    """A question's view of its documents; all of it is computed once, on demand."""

    def __init__(self, question: str, documents: Sequence[Document]) -> None:
        self.question = question
        self.documents = documents
        self.wanted = content_words(re.sub(r"`[\w.]+`", " ", question)) or content_words(question)
        self.names = re.findall(r"`([A-Za-z_][\w.]*)`", question)

    @cached_property
    def weight(self) -> Mapping[str, float]:
        return weights(document.text for document in self.documents)

    @cached_property
    def ranked(self) -> list[Ranked]:
        """All documents, best first; equal scores in the order in which the prompt shows them, last first."""
        rows = [Ranked(document, self._score(document)) for document in reversed(self.documents)]
        return sorted(rows, key=lambda row: -row.score)

    @cached_property
    def named(self) -> list[Document]:
        """The documents whose full names the question gives, in the question's order."""
        by_name = {document.name: document for document in self.documents}
        return [by_name[name] for name in dict.fromkeys(self.names) if name in by_name]

    @cached_property
    def best(self) -> list[Sentence]:
        """The sentences of the best documents, best first; of the named documents only, where there are."""
        chosen = self.named or [row.document for row in self.ranked[:TOP_DOCUMENTS]]
        top = {row.document: row.score for row in self.ranked}
        found = [
            Sentence(text, document, coverage(self.wanted, content_words(text), self.weight) + top[document])
            for document in chosen
            for text in sentences(document.body)
        ]
        return sorted(found, key=lambda row: -row.score)

    @property
    def support(self) -> float:
        """How much of the question the best document speaks of, 0 to 1."""
        if not self.documents or self.lacks_named:
            return 0.0
        document = self.ranked[0].document
        share = coverage(self.wanted, content_words(document.text), self.weight)
        return min(1.0, share + (SUPPORT_OF_NAME if document in self.named else 0.0))

    @property
    def lacks_named(self) -> bool:
        """Whether the question names a member of a module and no document has that name."""
        full = [name for name in self.names if "." in name]
        known = {document.name for document in self.documents}
        return bool(full) and not any(name in known for name in full)

    def _score(self, document: Document) -> float:
        score = coverage(self.wanted, content_words(document.text), self.weight)
        if document.name in self.names:
            return score + NAMED_BONUS
        if any(document.name.endswith("." + name) for name in self.names):
            return score + TAIL_BONUS
        roots = {*self.names, *re.findall(r"\w+", self.question)}
        return score + (
            MODULE_BONUS if document.name.split(".")[0] in roots and "." in document.name else 0.0
        )
