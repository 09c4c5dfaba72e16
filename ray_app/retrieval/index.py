"""Which rows a question may see, and the exact ranking of those rows.

Owns the scope map and the vectors. It scores the allowed rows and no others, so that a small scope never
loses a document to a global cut-off. It refuses files that do not fit each other, at start-up. It
knows neither texts nor models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ray_app.errors import DatasetError
from ray_app.retrieval.corpus import Corpus, IntArray, parse_id

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

MIN_SCORE = 0.1
PROBED_ROWS = 256
EXACT = "exact"


class UnknownScope(DatasetError):
    """A request named a question that the scope map does not have."""


class Ranking(NamedTuple):
    """Rows of one query by falling score, equal scores by row."""

    rows: IntArray
    scores: FloatArray

    def first(self, count: int) -> Ranking:
        return Ranking(self.rows[:count], self.scores[:count])


@dataclass(frozen=True)
class ScopeMap:
    """Allowed rows per question id: sorted, without doubles, in one CSR pair of arrays.

    `missing` are the document ids that the map names and the corpus does not have.
    """

    positions: Mapping[str, int]
    offsets: IntArray
    flat_rows: IntArray
    missing: IntArray

    @classmethod
    def from_examples(cls, path: Path, corpus: Corpus) -> ScopeMap:
        """Reads `{question id: [document id, ...]}`. Raises DatasetError naming the entry that is wrong."""
        listed = {question: _ids(path, question, ids) for question, ids in _read_object(path).items()}
        rows = [corpus.row_of(ids) for ids in listed.values()]
        kept = [np.unique(row[row >= 0]) for row in rows]
        absent = [ids[row < 0] for ids, row in zip(listed.values(), rows, strict=True)]
        return cls(
            positions={question: position for position, question in enumerate(listed)},
            offsets=np.cumsum([0, *map(len, kept)], dtype=np.int64),
            flat_rows=_concatenate(kept),
            missing=np.unique(_concatenate(absent)),
        )

    def __len__(self) -> int:
        return len(self.positions)

    def rows(self, question_id: str) -> IntArray:
        """The allowed rows of one question. Raises UnknownScope with the id."""
        position = self.positions.get(question_id)
        if position is None:
            raise UnknownScope(
                f"unknown question id {question_id[:100]!r}: the scope map has {len(self)} others; "
                "add it to the examples file or search without a scope"
            )
        return self.flat_rows[self.offsets[position] : self.offsets[position + 1]]


class VectorIndex:
    """Unit vectors, one per corpus row: float32 [n, dim].

    Files are mapped, not read: all replicas of a node share the pages, and none has a copy.
    """

    # What `nearest` may be off by: the rounding of sums that are added up in another order.
    tolerance = 1e-5

    def __init__(self, vectors: FloatArray) -> None:
        if vectors.ndim != 2 or vectors.dtype != np.float32 or not len(vectors):
            raise DatasetError(f"vectors are {vectors.dtype} {vectors.shape}; expected float32 [n, dim]")
        _check_unit_length(vectors)
        self.vectors: FloatArray = np.asarray(vectors)
        # Unmaps the memory that `vectors` look at when it goes, where that is FAISS's own.
        self._owner: Any = None

    @classmethod
    def open(cls, path: Path) -> VectorIndex:
        """Maps a `.npy` array, or a flat FAISS index (any other suffix).

        Raises DatasetError when the file is missing, cut short or of another kind.
        """
        if not path.is_file():
            raise DatasetError(f"index file {str(path)!r} does not exist; build the index first")
        return cls._from_npy(path) if path.suffix == ".npy" else cls._from_faiss(path)

    @classmethod
    def _from_npy(cls, path: Path) -> VectorIndex:
        try:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DatasetError(f"index {str(path)!r} is unreadable ({error}); build it again") from None
        return cls(vectors)

    @classmethod
    def _from_faiss(cls, path: Path) -> VectorIndex:
        import faiss  # takes half a second, and not every user of this module needs it

        try:
            owner = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise DatasetError(f"index {str(path)!r} is unreadable ({reason}); build it again") from None
        index = faiss.downcast_index(owner)
        if not isinstance(index, faiss.IndexFlat):
            raise DatasetError(f"index {str(path)!r} is a {type(index).__name__}; expected a flat index")
        vectors = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
        loaded = cls(vectors)
        loaded._owner = owner
        return loaded

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    def search(
        self,
        queries: FloatArray,
        rows_per_query: Sequence[IntArray],
        top_k: int,
        min_score: float = MIN_SCORE,
        mode: str = EXACT,
    ) -> list[Ranking]:
        """Ranks only the given rows: per query at most `top_k`, each scoring more than `min_score`.

        `queries` is float32 [n, dim]. Mode "postfilter:K" answers as a search of everything that keeps
        its first K and drops what is not allowed: always a prefix of the exact ranking.
        """
        depth = postfilter_depth(mode)
        exact = [
            self._rank(query, rows, top_k, min_score)
            for query, rows in zip(queries, rows_per_query, strict=True)
        ]
        if depth is None:
            return exact
        reached = self.search_all(queries, depth, min_score)
        return [_prefix_within(ranking, seen.rows) for ranking, seen in zip(exact, reached, strict=True)]

    def search_all(
        self,
        queries: FloatArray,
        top_k: int,
        min_score: float = MIN_SCORE,
        eligible: BoolArray | None = None,
    ) -> list[Ranking]:
        """Ranks every row (of those that `eligible`, bool [n], marks) through FAISS's flat search."""
        if not len(queries):
            return []
        found: list[Ranking | None] = [None] * len(queries)
        depth = top_k + 1
        while pending := [i for i, ranking in enumerate(found) if ranking is None]:
            depth = min(depth, len(self))
            for i, near in zip(pending, self.nearest(queries[pending], depth), strict=True):
                allowed = near.rows if eligible is None else near.rows[eligible[near.rows]]
                ranking = self._rank(queries[i], allowed, top_k, min_score)
                if depth == len(self) or self._is_settled(ranking, top_k, near, min_score):
                    found[i] = ranking
            depth *= 2
        return [ranking for ranking in found if ranking is not None]

    def nearest(self, queries: FloatArray, depth: int) -> list[Ranking]:
        """The `depth` rows of highest score, which may be off by `tolerance`; of equal ones, any."""
        import faiss  # see above

        # Over the mapped array itself: an index object would hold a copy of it.
        scores, rows = faiss.knn(
            np.ascontiguousarray(queries), self.vectors, depth, metric=faiss.METRIC_INNER_PRODUCT
        )
        # A query of NaN is near nothing: FAISS then says -1.
        found = [Ranking(row_ids, row_scores) for row_ids, row_scores in zip(rows, scores, strict=True)]
        return [near.first(int((near.rows >= 0).sum())) for near in found]

    def _is_settled(self, ranking: Ranking, top_k: int, near: Ranking, min_score: float) -> bool:
        # What was not returned scores at most as the last that was, up to rounding; a full ranking that
        # ends clearly above that cannot change, ties included.
        if not len(near.rows):
            return True
        last_score = float(near.scores[-1])
        if last_score + self.tolerance < min_score:
            return True
        return len(ranking.rows) == top_k and float(ranking.scores[-1]) > last_score + self.tolerance

    def _rank(self, query: FloatArray, rows: IntArray, top_k: int, min_score: float) -> Ranking:
        # einsum adds every row up in the same order, so equal vectors get equal scores and a document
        # scores the same in every scope; a BLAS product differs in the last bit by position.
        scores = np.einsum("ij,j->i", self.vectors[rows], query)
        above = scores > min_score
        rows, scores = rows[above], scores[above]
        order = np.lexsort((rows, -scores))[:top_k]
        return Ranking(rows[order], scores[order])


def postfilter_depth(mode: str) -> int | None:
    """K of "postfilter:K", None for "exact". Raises ValueError for anything else."""
    if mode == EXACT:
        return None
    kind, _, depth = mode.partition(":")
    if kind == "postfilter" and depth.isascii() and depth.isdigit() and int(depth) > 0:
        return int(depth)
    raise ValueError(f"mode {mode!r} is unknown; expected 'exact' or 'postfilter:K' with K > 0")


def not_unit(vectors: FloatArray) -> IntArray:
    """The rows whose length is not 1, of float32 [n, dim]."""
    with np.errstate(all="ignore"):  # what a broken file holds may be any number
        lengths = np.linalg.norm(vectors, axis=1)
        # Half precision leaves a length within this of 1; NaN is not within it.
        return np.flatnonzero(~(np.abs(lengths - 1) < 0.01))


def check_fit(corpus: Corpus, index: VectorIndex, encoder_dim: int) -> None:
    """Raises DatasetError unless index row i can be corpus row i, embedded by this encoder."""
    if len(corpus) != len(index):
        raise DatasetError(
            f"the index has {len(index)} vectors and the corpus {len(corpus)} documents; "
            "build the index from this corpus"
        )
    if index.dim != encoder_dim:
        raise DatasetError(
            f"the index has {index.dim} dimensions and the encoder gives {encoder_dim}; "
            "use the encoder that the index was built with"
        )


def _prefix_within(ranking: Ranking, reached: IntArray) -> Ranking:
    inside = np.isin(ranking.rows, reached)
    return ranking.first(len(inside) if inside.all() else int(inside.argmin()))


def _check_unit_length(vectors: FloatArray) -> None:
    rows = np.linspace(0, len(vectors) - 1, min(PROBED_ROWS, len(vectors)), dtype=np.int64)
    wrong = rows[not_unit(vectors[rows])]
    if len(wrong):
        length = np.linalg.norm(vectors[wrong[0]])
        raise DatasetError(
            f"the vector of row {wrong[0]} has length {length:.3g}; expected unit vectors, "
            "because scores are inner products"
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        examples = json.loads(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"cannot read scope map {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise DatasetError(f"scope map {str(path)!r} is not JSON ({error})") from None
    if not isinstance(examples, dict):
        raise DatasetError(f"scope map {str(path)!r} is no object {{question id: [document id, ...]}}")
    return examples


def _ids(path: Path, question: str, listed: object) -> IntArray:
    if not isinstance(listed, list):
        raise DatasetError(f"scope map {str(path)!r}: {question!r} holds {type(listed).__name__}, not a list")
    ids = [parse_id(value) for value in listed]
    if None in ids:
        wrong = listed[ids.index(None)]
        raise DatasetError(f"scope map {str(path)!r}: {question!r} lists {wrong!r}, which is not an integer")
    return np.array(ids, dtype=np.int64)


def _concatenate(arrays: list[IntArray]) -> IntArray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
