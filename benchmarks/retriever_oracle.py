"""What a scoped search should find: every allowed row scored by brute force, and how much of it was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.retriever_data import Query
from ray_app.retrieval.corpus import IntArray
from ray_app.retrieval.encoder import FloatArray
from ray_app.retrieval.index import MIN_SCORE, BoolArray

TOP_K = 50
# Two encodings of a text differ in the last bits by their place in a batch, and swap what scores alike.
TOLERANCE = 1e-5


class Oracle:
    """Scores of all rows that may be found for a query. `eligible`: bool [rows], the long enough texts."""

    def __init__(
        self, vectors: FloatArray, ids: IntArray, eligible: BoolArray, scopes: Mapping[str, IntArray]
    ) -> None:
        self._vectors, self._ids, self._eligible, self._scopes = vectors, ids, eligible, scopes

    def missed(self, query: Query, vector: FloatArray, found: Sequence[int]) -> tuple[int, int]:
        """How many of the best TOP_K in scope are not in `found`, and how many there are.

        A row that scores as the last of them does may stand for another that scores so.
        """
        rows = self._scopes.get(query.eid, np.empty(0, dtype=np.int64))
        rows = rows[self._eligible[rows]]
        scores = self._vectors[rows] @ vector
        order = np.argsort(-scores)[:TOP_K]
        best = order[scores[order] > MIN_SCORE + TOLERANCE]
        if not len(best):
            return 0, 0
        allowed = dict(zip(self._ids[rows].tolist(), scores.tolist(), strict=True))
        lowest = float(scores[best[-1]]) - TOLERANCE
        good = {document for document in found if allowed.get(document, -1.0) >= lowest}
        return max(0, len(best) - len(good)), len(best)

    def recall(self, queries: Sequence[Query], vectors: FloatArray, found: Sequence[Sequence[int]]) -> float:
        """The share of all that should be found for `queries` which was."""
        counts = [
            self.missed(query, vector, ids)
            for query, vector, ids in zip(queries, vectors, found, strict=True)
        ]
        missed, wanted = (sum(column) for column in zip(*counts, strict=True))
        return float(1 - missed / wanted)
