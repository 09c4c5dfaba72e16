"""What a GPU gives the retriever: encode rate, gather and score, memory. Runs without Ray.

    python -m benchmarks.retriever_cuda [--device cuda|cpu] [--small] [--json PATH]

Needs torch, transformers, numpy and pyarrow; weights and vectors are random. The ceilings (matrix rate,
copy bandwidth) are measured on the same card in the same run. `--small`, the only size for a CPU, shows
in seconds that every row works: it judges the ranking, not the speed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cuda_parts import (
    PIECE_ROWS,
    build_encoder,
    encode,
    encoder_flops,
    faiss_index,
    gpu_faiss,
    seconds,
    set_compiled,
)
from benchmarks.figures import Figure, write
from benchmarks.retriever_data import draw_scopes
from ray_app.retrieval.gpu import SCORE_TOLERANCE, DeviceIndex, ResidentVectors, Scopes
from ray_app.retrieval.index import VectorIndex

GIB = float(1 << 30)
TOP_K, FLAT_TOP_K = 50, 1000
SHARE_TARGET = 0.60
# Batches that take turns, so that no call finds its rows in the cache where the last one left them.
ROTATED = 4
# The arguments of transformers' Qwen3Config for Qwen3-Embedding-8B.
LARGE_ENCODER = {
    "vocab_size": 151_665,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TINY_ENCODER = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `texts` are (kind, texts in a batch, tokens of each)."""

    matrix: int
    copied_values: int
    rows: int
    dim: int
    batch: int
    encoder: dict[str, Any]
    texts: tuple[tuple[str, int, int], ...]


FULL = Sizes(
    matrix=8192,
    copied_values=1 << 30,
    rows=176_522,
    dim=4096,
    batch=256,
    encoder=LARGE_ENCODER,
    texts=(("queries", 64, 64), ("queries", 256, 64), ("documents", 64, 512)),
)
SMALL = Sizes(
    matrix=512,
    copied_values=1 << 22,
    rows=4000,
    dim=128,
    batch=16,
    encoder=TINY_ENCODER,
    texts=(("queries", 8, 16), ("documents", 4, 64)),
)


Section = Callable[[], Iterator[Figure]]


class Bench:
    """The sections of the table, in the order in which later ones use the ceilings of earlier ones."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device = torch.device(device)
        self.sizes = sizes
        self.matrix_flops = float("nan")
        self.copy_bytes_s = float("nan")
        self._rng = np.random.default_rng(4)
        self._vectors: ResidentVectors | None = None

    def sections(self) -> list[Section]:
        return [self.ceilings, self.ranking, self.scoped, self.unscoped, self.encoder]

    def ceilings(self) -> Iterator[Figure]:
        """The card's own rates: what everything else is a share of."""
        n = self.sizes.matrix
        left, right = self._normal(n, n).bfloat16(), self._normal(n, n).bfloat16()
        self.matrix_flops = 2 * n**3 / seconds([lambda: left @ right], self.device)
        yield Figure(f"bf16 matrix rate, {n} x {n}, random data", self.matrix_flops / 1e12, unit="TFLOP/s")
        source = self._normal(self.sizes.copied_values)
        copy = torch.empty_like(source)
        moved = 2 * source.numel() * source.element_size()
        self.copy_bytes_s = moved / seconds([lambda: copy.copy_(source)], self.device)
        yield Figure("copy bandwidth, bytes read + written", self.copy_bytes_s / 1e9, unit="GB/s")

    def ranking(self) -> Iterator[Figure]:
        """The device's ranking beside numpy's in float32."""
        vectors = _unit(self._rng.normal(size=(min(self.sizes.rows, 20_000), self.sizes.dim)))
        queries = _unit(vectors[:32] + vectors[32:64])
        scopes = draw_scopes(self._rng, len(queries), len(vectors))
        found = DeviceIndex(vectors, device=str(self.device)).search(queries, scopes, TOP_K, -1.0)
        tolerance = SCORE_TOLERANCE["float16"]
        errors, certain, kept = [0.0], 0, 0
        for mine, exact in zip(
            found, VectorIndex(vectors).search(queries, scopes, len(vectors), -1.0), strict=True
        ):
            true = dict(zip(exact.rows.tolist(), exact.scores.tolist(), strict=True))
            errors += [
                abs(s - true[r]) for r, s in zip(mine.rows.tolist(), mine.scores.tolist(), strict=True)
            ]
            last = exact.scores[TOP_K - 1] if len(true) > TOP_K else -1.0
            sure = exact.rows[exact.scores > last + 2 * tolerance]
            certain, kept = certain + len(sure), kept + int(np.isin(sure, mine.rows).sum())
        yield Figure("scoped: largest error of a score against float32", max(errors), "<=", tolerance)
        yield Figure(f"scoped: recall@{TOP_K} of rows clear of the cut", kept / certain, ">=", 1.0)

    def scoped(self) -> Iterator[Figure]:
        """Gather and score for one batch, against the bytes that it must read."""
        vectors, sizes = self.vectors, self.sizes
        drawn = [draw_scopes(self._rng, sizes.batch, sizes.rows) for _ in range(ROTATED)]
        queries = [self._normal(sizes.batch, sizes.dim) for _ in drawn]
        pairs = [(q, vectors.pack(scopes)) for q, scopes in zip(queries, drawn, strict=True)]
        moved = statistics.fmean(least_bytes(q, scopes, vectors.vectors) for q, scopes in pairs)
        total = statistics.fmean(len(scopes.rows) for _, scopes in pairs)
        yield Figure(f"scoped: rows in {sizes.batch} scopes", total, unit="rows")
        yield Figure("scoped: its bytes at the copy bandwidth", moved / self.copy_bytes_s * 1e6, unit="us")
        scored_s = seconds([partial(vectors.scores, *pair) for pair in pairs], self.device, graph=True)
        yield Figure(f"scoped: gather + score ({vectors.method})", scored_s * 1e6, unit="us")
        yield Figure("scoped: share of the copy bandwidth", moved / self.copy_bytes_s / scored_s)
        ranked_s = seconds([partial(vectors.rank, *pair, TOP_K, -1.0) for pair in pairs], self.device)
        yield Figure(f"scoped: gather + score + top {TOP_K}", ranked_s * 1e6, unit="us")
        hosted = [(q.cpu().numpy(), scopes) for q, scopes in zip(queries, drawn, strict=True)]
        whole_s = seconds([partial(vectors.search, *pair, TOP_K, -1.0) for pair in hosted], self.device)
        yield Figure("scoped: whole search, from and to the host", whole_s * 1e6, unit="us")

    def unscoped(self) -> Iterator[Figure]:
        """The same batch over everything: what a scope saves."""
        vectors, depth = self.vectors.vectors, min(FLAT_TOP_K, self.sizes.rows)
        queries = self._normal(self.sizes.batch, self.sizes.dim).to(vectors.dtype)
        took_s = seconds([lambda: (queries @ vectors.T).topk(depth)], self.device)
        yield Figure(f"unscoped: torch product + top {depth}", took_s * 1e6, unit="us")
        if self.device.type == "cuda" and (faiss := gpu_faiss()) is not None:
            index = faiss_index(faiss, vectors)
            hosted = queries.float().cpu().numpy()
            took_s = seconds([lambda: index.search(hosted, depth)], self.device)
            yield Figure(f"unscoped: FAISS flat float16, top {depth}", took_s * 1e6, unit="us")

    def encoder(self) -> Iterator[Figure]:
        """Tokens a second, as transformers runs it and with compiled layers, and the memory of it all."""
        yield Figure("memory: resident vectors", _gib(self.vectors.vectors), unit="GiB")
        model = build_encoder(self.sizes.encoder, self.device)
        yield Figure("memory: encoder weights", sum(map(_gib, model.parameters())), unit="GiB")
        for kind, count, tokens in self.sizes.texts:
            ids = torch.randint(self.sizes.encoder["vocab_size"], (count, tokens), device=self.device)
            yield from self._encode_rates(model, ids, f"{kind}, {count} x {tokens} tokens")
        if self.device.type == "cuda":
            peak, card = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
            yield Figure("memory: peak of vectors, encoder and its work", peak / GIB, unit="GiB")
            yield Figure("memory: of the card", card / GIB, unit="GiB")

    def _encode_rates(self, model: Any, ids: torch.Tensor, name: str) -> Iterator[Figure]:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for method in ("eager", "compiled"):
            set_compiled(model, method == "compiled")
            took_s = seconds([lambda: encode(model, ids)], self.device)
            yield Figure(f"encode {name}, {method}", ids.numel() / took_s, unit="tokens/s")
            share = encoder_flops(model, *ids.shape) / took_s / self.matrix_flops
            row = Figure(f"encode {name}, {method}: share of matrix rate", share)
            is_judged = method == "compiled" and self.sizes is FULL
            yield replace(row, op=">=", target=SHARE_TARGET) if is_judged else row

    @property
    def vectors(self) -> ResidentVectors:
        """Random unit vectors, made on the device the first time."""
        if self._vectors is None:
            held = torch.empty(self.sizes.rows, self.sizes.dim, dtype=torch.float16, device=self.device)
            for start in range(0, self.sizes.rows, PIECE_ROWS):
                part = held[start : start + PIECE_ROWS]
                part.copy_(torch.nn.functional.normalize(self._normal(*part.shape)))
            self._vectors = ResidentVectors(held)
        return self._vectors

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device)


def least_bytes(queries: torch.Tensor, scopes: Scopes, vectors: torch.Tensor) -> int:
    """What scoring must read from memory: each row of any scope once, the row numbers and the queries."""
    row_bytes = vectors.shape[1] * vectors.element_size()
    return len(np.unique(scopes.rows.cpu().numpy())) * row_bytes + scopes.rows.nbytes + queries.nbytes


def _unit(values: Any) -> Any:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def _gib(tensor: torch.Tensor) -> float:
    return tensor.nbytes / GIB


def describe(device: str) -> str:
    """The card and the versions that the figures belong to."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    packages = []
    for package in ("torch", "triton", "transformers", "faiss-gpu-cu12"):
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            packages.append(f"no {package}")
    return f"{device}: {name}; {', '.join(packages)}"


def measure(section: Section, out: list[Figure]) -> bool:
    """Prints and keeps the section's rows. False when it broke: the others are still worth their time."""
    try:
        for figure in section():
            print(figure.line, flush=True)
            out.append(figure)
    except Exception:
        traceback.print_exc()
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: every target reached; 1: a target missed or a section broken; 2: no such device."""
    parser = argparse.ArgumentParser(description="GPU figures of the retriever")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="seconds, not minutes; judges no speed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; run this where there is one, or with --device cpu --small")
    if options.device == "cpu" and not options.small:
        parser.error("the full size would take a CPU hours; add --small")
    print(describe(options.device), flush=True)
    figures: list[Figure] = []
    with torch.inference_mode():
        bench = Bench(options.device, SMALL if options.small else FULL)
        broken = [section for section in bench.sections() if not measure(section, figures)]
    if options.json:
        write(figures, options.json)
    return 0 if not broken and all(figure.is_reached for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
