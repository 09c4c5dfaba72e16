"""The Triton kernel behind `gpu.py`: inner products of each query with the rows of its own scope.

Needs Triton, so only `gpu.py` imports it, and only for a CUDA device. Every row is read from device memory
once, 16 bytes per load, and nothing is gathered into a copy; all rows are added up in one order, so that
equal vectors get equal scores wherever they stand. It checks nothing: a foreign row reads foreign memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

# A tile of 8 rows by 512 columns gives each of 128 threads four loads of 16 bytes that do not wait for
# each other, and reads a query's values once for 8 rows.
TILE_ROWS = 8
TILE_COLUMNS = 512
WARPS = 4


def score_scopes(
    vectors: torch.Tensor, queries: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, width: int
) -> torch.Tensor:
    """float32 [b, width] scores, -inf after a scope's end; shapes and dtypes as in `gpu.Scopes`."""
    scores = torch.empty((len(queries), width), dtype=torch.float32, device=queries.device)
    grid = (triton.cdiv(width, TILE_ROWS), len(queries))
    kernel: Any = _score_tile
    arguments = (vectors, queries, rows, offsets, scores, vectors.shape[1], width)
    kernel[grid](*arguments, TILE_ROWS, TILE_COLUMNS, num_warps=WARPS)
    return scores


@triton.jit(do_not_specialize=["width"])  # type: ignore[untyped-decorator, unused-ignore]
def _score_tile(  # type: ignore[no-untyped-def]
    vectors,
    queries,
    rows,
    offsets,
    scores,
    dim,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    query = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    slots = first + tl.arange(0, ROWS)
    start = tl.load(offsets + query)
    length = tl.load(offsets + query + 1) - start
    within = slots < length
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if first < length:
        row = tl.load(rows + start + slots, mask=within, other=0)
        for column in range(0, dim, COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            inside = columns < dim
            addresses = vectors + row[:, None] * dim + columns[None, :]
            values = tl.load(addresses, mask=within[:, None] & inside[None, :], other=0.0)
            weights = tl.load(queries + query * dim + columns, mask=inside, other=0.0)
            total += values.to(tl.float32) * weights[None, :]
    found = tl.where(within, tl.sum(total, axis=1), float("-inf"))
    tl.store(scores + query * width + slots, found, mask=slots < width)
