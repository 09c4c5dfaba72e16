"""Exact scoped search with the vectors resident on a device, by torch.

Owns the copy on the device and the ranking of many scopes in one pass: it reads the allowed rows and no
others, and pads scores, never vectors. It ranks as `index.py` does up to the rounding of the stored
vectors: scores lie within `SCORE_TOLERANCE` of the float32 ones, so rows whose float32 scores are
farther apart than twice that come in the same order, and equal vectors rank by row. It is no approximate
search. A search of everything goes through FAISS where its GPU part is installed, else through torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ray_app.errors import ConfigError
from ray_app.retrieval.corpus import IntArray
from ray_app.retrieval.index import EXACT, MIN_SCORE, FloatArray, Ranking, VectorIndex, postfilter_depth

if TYPE_CHECKING:
    import torch

Precision = Literal["float16", "bfloat16", "float32"]
# Worst cases for unit vectors of up to 4096 dimensions: a stored value is off by at most half a unit in
# its last place (2^-11 and 2^-8 of itself), and so is, at most, the sum of |value x weight| <= 1.
SCORE_TOLERANCE: dict[Precision, float] = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-5}

UPLOAD_VALUES = 1 << 25
GATHERED_VALUES = 1 << 24
FAISS_MOST = 2048  # results of one query, on a GPU


class Scopes(NamedTuple):
    """The rows of a batch on the device: query i may see `rows[offsets[i]:offsets[i + 1]]`, ascending.

    `rows` is int64 [total], `offsets` int64 [b + 1], `width` the length of the longest.
    """

    rows: torch.Tensor
    offsets: torch.Tensor
    width: int


class Best(NamedTuple):
    """Rows int64 and scores float32, both [b, k], by falling score; -inf where there is none."""

    rows: torch.Tensor
    scores: torch.Tensor


class DeviceIndex(VectorIndex):
    """A VectorIndex that searches on `device`; vectors float32 [n, dim] of length 1, mapped on the host.

    A search of everything finds its candidates on the device and scores them on the host.
    """

    def __init__(self, vectors: FloatArray, device: str = "cuda", precision: Precision = "float16") -> None:
        super().__init__(vectors)
        self.tolerance = 2 * SCORE_TOLERANCE[precision]  # the query is rounded too
        self.resident = ResidentVectors.upload(vectors, device, precision)

    @classmethod
    def open_on(cls, path: Path, device: str, precision: Precision = "float16") -> DeviceIndex:
        """Opens what VectorIndex.open opens. Raises DatasetError as it does, and ConfigError."""
        host = VectorIndex.open(path)
        opened = cls(host.vectors, device, precision)
        opened._owner = host
        return opened

    def nearest(self, queries: FloatArray, depth: int) -> list[Ranking]:
        """As VectorIndex.nearest."""
        return self.resident.nearest(queries, depth)

    def search(
        self,
        queries: FloatArray,
        rows_per_query: Sequence[IntArray],
        top_k: int,
        min_score: float = MIN_SCORE,
        mode: str = EXACT,
    ) -> list[Ranking]:
        """As VectorIndex.search, for scopes that are sorted."""
        if postfilter_depth(mode) is None:
            return self.resident.search(queries, rows_per_query, top_k, min_score)
        return super().search(queries, rows_per_query, top_k, min_score, mode)


class ResidentVectors:
    """Unit vectors [n, dim] that stay on one device, in float16, bfloat16 or float32."""

    def __init__(self, vectors: torch.Tensor) -> None:
        self.vectors = vectors.contiguous()
        self._kernel = _triton_kernel() if vectors.is_cuda else None

    @classmethod
    def upload(cls, vectors: FloatArray, device: str, precision: Precision) -> ResidentVectors:
        """Copies `vectors`, float32 [n, dim], piece by piece: no second float32 copy exists anywhere.

        Raises ConfigError when torch has no such device.
        """
        import torch  # takes seconds, and only a process that searches on a device needs it

        try:
            resident = torch.empty(vectors.shape, dtype=getattr(torch, precision), device=device)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"device {device!r} cannot hold the vectors ({reason}); expected 'cpu', or 'cuda' with room"
            ) from None
        step = max(1, UPLOAD_VALUES // vectors.shape[1])
        for start in range(0, len(vectors), step):
            resident[start : start + step] = torch.tensor(vectors[start : start + step])
        return cls(resident)

    @property
    def method(self) -> str:
        """How scores are computed: "triton", or "torch" where there is no Triton or no GPU."""
        return "torch" if self._kernel is None else "triton"

    def search(
        self,
        queries: FloatArray | torch.Tensor,
        rows_per_query: Sequence[IntArray],
        top_k: int,
        min_score: float = MIN_SCORE,
    ) -> list[Ranking]:
        """Per query at most `top_k` of its rows, each scoring more than `min_score`, best first.

        `queries` is float [b, dim], on the host or the device. Raises IndexError for a row that is not
        there and ValueError when queries and scopes differ in number or dimension.
        """
        import torch  # see above

        if len(queries) != len(rows_per_query) or queries.shape[1:] != self.vectors.shape[1:]:
            raise ValueError(
                f"queries {tuple(queries.shape)} for {len(rows_per_query)} scopes; "
                f"expected [{len(rows_per_query)}, {self.vectors.shape[1]}]"
            )
        scopes = self.pack(rows_per_query)
        if not scopes.width:
            return [Ranking(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in rows_per_query]
        weights = queries if isinstance(queries, torch.Tensor) else torch.from_numpy(_writable(queries))
        best = self.rank(weights.to(self.vectors.device), scopes, top_k, min_score)
        return _rankings(best)

    def nearest(self, queries: FloatArray, depth: int) -> list[Ranking]:
        """The `depth` of all rows with the highest scores, per query; of equal ones, any."""
        import torch  # see above

        weights = torch.from_numpy(_writable(queries)).to(self.vectors.device, self.vectors.dtype)
        faiss = gpu_faiss() if self.vectors.is_cuda and depth <= FAISS_MOST else None
        if faiss is None:
            return _rankings(self._nearest_by_product(weights, depth))
        scores, rows = faiss.knn_gpu(
            _faiss_resources(), weights, self.vectors, depth, metric=faiss.METRIC_INNER_PRODUCT
        )
        return _rankings(Best(rows, scores))

    def _nearest_by_product(self, weights: torch.Tensor, depth: int) -> Best:
        import torch  # see above

        best = Best(*(torch.empty(len(weights), 0, device=weights.device) for _ in range(2)))
        step = max(depth, GATHERED_VALUES // max(1, len(weights)))
        for start in range(0, len(self.vectors), step):
            scores = (weights @ self.vectors[start : start + step].T).float()
            found = scores.topk(min(depth, scores.shape[1]))
            rows = torch.cat([best.rows.long(), found.indices + start], dim=1)
            merged = torch.cat([best.scores, found.values], dim=1)
            top = merged.topk(min(depth, merged.shape[1]))
            best = Best(rows.gather(1, top.indices), top.values)
        return best

    def pack(self, rows_per_query: Sequence[IntArray]) -> Scopes:
        """The scopes, each sorted, as one CSR pair on the device. Raises IndexError for a foreign row."""
        import torch  # see above

        lengths = [len(rows) for rows in rows_per_query]
        rows = np.concatenate([np.empty(0, np.int64), *rows_per_query], dtype=np.int64)
        # The kernel would read whatever lies there.
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self.vectors):
            raise IndexError(f"rows {rows.min()} to {rows.max()}; expected 0 to {len(self.vectors) - 1}")
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        device = self.vectors.device
        return Scopes(
            torch.from_numpy(rows).to(device), torch.from_numpy(offsets).to(device), max(lengths, default=0)
        )

    def rank(self, queries: torch.Tensor, scopes: Scopes, top_k: int, min_score: float) -> Best:
        """The ranking on the device; `queries` [b, dim] lies there. Waits for nothing."""
        import torch  # see above

        scores = self.scores(queries, scopes)
        # Also drops NaN, which a sort would put first.
        scores = torch.where(scores > min_score, scores, -torch.inf)
        # Stable over ascending rows: equal scores stay by row, which topk does not promise.
        ordered, slots = scores.sort(dim=1, descending=True, stable=True)
        places = scopes.offsets[:-1, None] + slots[:, :top_k]
        rows = scopes.rows[places.clamp(max=len(scopes.rows) - 1)]
        return Best(rows, ordered[:, :top_k])

    def scores(self, queries: torch.Tensor, scopes: Scopes) -> torch.Tensor:
        """float32 [b, width]: products of each query with its own rows, -inf after the last."""
        import torch  # see above

        weights = queries.float().contiguous()
        if self._kernel is None:
            return _gathered_scores(self.vectors, weights, scopes)
        with torch.cuda.device(self.vectors.device):
            scores: torch.Tensor = self._kernel.score_scopes(self.vectors, weights, *scopes)
        return scores


def _gathered_scores(vectors: torch.Tensor, queries: torch.Tensor, scopes: Scopes) -> torch.Tensor:
    """The same scores by plain torch: rows are gathered in pieces, so that the copy stays small."""
    import torch  # see above

    lengths = scopes.offsets.diff()
    owners = torch.arange(len(queries), device=vectors.device).repeat_interleave(lengths)
    slots = torch.arange(len(scopes.rows), device=vectors.device) - scopes.offsets[owners]
    scores = torch.full((len(queries), scopes.width), -torch.inf, device=vectors.device)
    step = max(1, GATHERED_VALUES // vectors.shape[1])
    for start in range(0, len(scopes.rows), step):
        part = slice(start, start + step)
        # Not a matrix product: this adds every row up in one order, so equal vectors score the same.
        products = vectors[scopes.rows[part]].float() * queries[owners[part]]
        scores[owners[part], slots[part]] = products.sum(dim=1)
    return scores


def _rankings(best: Best) -> list[Ranking]:
    rows, scores = best.rows.cpu().numpy(), best.scores.cpu().numpy()
    counts = np.isfinite(scores).sum(axis=1)
    return [Ranking(rows[i, :count], scores[i, :count]) for i, count in enumerate(counts)]


def _writable(queries: FloatArray) -> FloatArray:
    # torch shares the memory and warns about arrays that it could not write to.
    return np.require(queries, np.float32, ["C", "W"])


def gpu_faiss() -> Any | None:
    """FAISS, taking torch's tensors, where it is installed with its GPU part."""
    try:
        import faiss
        import faiss.contrib.torch_utils
    except ImportError:
        return None
    return faiss if hasattr(faiss, "StandardGpuResources") else None


@lru_cache(maxsize=1)
def _faiss_resources() -> Any:
    import faiss

    return faiss.StandardGpuResources()  # holds the scratch memory of all searches


@lru_cache(maxsize=1)
def _triton_kernel() -> ModuleType | None:
    try:
        from ray_app.retrieval import gpu_kernel  # Triton comes with torch on Linux and CUDA only
    except ImportError:
        return None
    return gpu_kernel
