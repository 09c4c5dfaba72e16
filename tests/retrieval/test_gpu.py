from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_app.errors import ConfigError
from ray_app.retrieval import gpu
from ray_app.retrieval.corpus import IntArray
from ray_app.retrieval.encoder import FloatArray
from ray_app.retrieval.gpu import SCORE_TOLERANCE, DeviceIndex, Precision, ResidentVectors
from ray_app.retrieval.index import Ranking, VectorIndex
from ray_app.retrieval.search import Query, Searcher
from tests.retrieval.data import FILTERS, WordEncoder, build_searcher, unit

PRECISIONS = list(SCORE_TOLERANCE)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NOTHING = np.empty(0, dtype=np.int64)


def random_units(seed: int, count: int, dim: int = 48) -> FloatArray:
    return unit(np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32))


def scopes(seed: int, count: int, total: int) -> list[IntArray]:
    """Sorted scopes of all sizes, empty ones and everything among them."""
    rng = np.random.default_rng(seed)
    drawn = [np.sort(rng.choice(total, rng.integers(1, 90), replace=False)) for _ in range(count - 3)]
    return [NOTHING, *drawn, np.arange(total), NOTHING]


def assert_same_ranking(mine: Ranking, exact: Ranking, tolerance: float) -> None:
    """Scores within the tolerance, and out of order only by twice that."""
    true = dict(zip(exact.rows.tolist(), exact.scores.tolist(), strict=True))
    in_order = [true[row] for row in mine.rows.tolist()]
    assert np.abs(mine.scores - in_order).max(initial=0) <= tolerance
    assert (np.diff(in_order) <= 2 * tolerance).all()
    assert len(set(mine.rows.tolist())) == len(mine.rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_allowed_rows_rank_as_numpy_ranks_them_within_the_tolerance(
    precision: Precision, device: str
) -> None:
    vectors, queries, allowed = random_units(0, 700), random_units(1, 30), scopes(2, 30, 700)
    found = DeviceIndex(vectors, device=device, precision=precision).search(queries, allowed, 700, -1.0)
    for rows, mine, exact in zip(
        allowed, found, VectorIndex(vectors).search(queries, allowed, 700, -1.0), strict=True
    ):
        assert sorted(mine.rows.tolist()) == rows.tolist()
        assert_same_ranking(mine, exact, SCORE_TOLERANCE[precision])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_cuts_at_top_k_and_least_score_lose_only_rows_within_the_tolerance(
    precision: Precision, device: str
) -> None:
    vectors, queries, allowed = random_units(3, 700), random_units(4, 30), scopes(5, 30, 700)
    found = DeviceIndex(vectors, device=device, precision=precision).search(queries, allowed, 20, 0.1)
    tolerance = SCORE_TOLERANCE[precision]
    whole = VectorIndex(vectors).search(queries, allowed, 700, -1.0)
    for mine, exact in zip(found, whole, strict=True):
        assert_same_ranking(mine, exact, tolerance)
        assert (mine.scores > 0.1).all()
        least = float(exact.scores[19]) if len(exact.scores) > 19 else -1.0
        sure = exact.rows[exact.scores > max(0.1, least) + 2 * tolerance]
        assert set(sure.tolist()) <= set(mine.rows.tolist())
        assert len(mine.rows) <= 20


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_search_of_everything_ranks_as_on_the_host(
    precision: Precision, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GATHERED_VALUES", 20 * 64)  # several pieces
    vectors, queries = random_units(20, 700), random_units(21, 20)
    vectors[400:420] = vectors[3]
    queries[5] = vectors[3]
    eligible = np.arange(700) % 3 > 0
    index, host = DeviceIndex(vectors, device=device, precision=precision), VectorIndex(vectors)
    for mine, exact in zip(
        index.search_all(queries, 10, 0.1, eligible), host.search_all(queries, 10, 0.1, eligible), strict=True
    ):
        assert mine.rows.tolist() == exact.rows.tolist()
        assert mine.scores.tolist() == exact.scores.tolist()


def test_float32_gives_numpys_very_ranking() -> None:
    vectors, queries, allowed = random_units(6, 500), random_units(7, 20), scopes(8, 20, 500)
    found = DeviceIndex(vectors, device="cpu", precision="float32").search(queries, allowed, 50)
    for mine, exact in zip(found, VectorIndex(vectors).search(queries, allowed, 50), strict=True):
        assert mine.rows.tolist() == exact.rows.tolist()
        assert mine.rows.dtype == exact.rows.dtype
        assert mine.scores.dtype == exact.scores.dtype


@pytest.mark.parametrize("device", DEVICES)
def test_equal_vectors_score_the_same_in_every_scope_and_rank_by_row(device: str) -> None:
    vectors = np.repeat(random_units(9, 1, dim=37), 300, axis=0)
    index, query = DeviceIndex(vectors, device=device), random_units(10, 1, dim=37)
    allowed = [np.arange(300), np.array([3, 17, 31]), np.array([299])]
    whole, three, one = index.search(np.repeat(query, 3, axis=0), allowed, 1000, -1.0)
    assert whole.rows.tolist() == list(range(300))
    assert three.rows.tolist() == [3, 17, 31]
    assert len({*whole.scores.tolist(), *three.scores.tolist(), *one.scores.tolist()}) == 1


def test_rows_gathered_in_many_pieces_score_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries, allowed = random_units(11, 300), random_units(12, 9), scopes(13, 9, 300)
    index = DeviceIndex(vectors, device="cpu")
    whole = index.search(queries, allowed, 50)
    monkeypatch.setattr(gpu, "GATHERED_VALUES", 7 * 48)
    monkeypatch.setattr(gpu, "UPLOAD_VALUES", 5 * 48)
    pieces = DeviceIndex(vectors, device="cpu").search(queries, allowed, 50)
    for mine, other in zip(pieces, whole, strict=True):
        assert mine.rows.tolist() == other.rows.tolist()
        assert mine.scores.tolist() == other.scores.tolist()


def test_no_query_and_empty_scopes_find_nothing() -> None:
    index = DeviceIndex(random_units(14, 5), device="cpu")
    assert index.search(random_units(15, 0), [], 5) == []
    for ranking in index.search(random_units(15, 2), [NOTHING, NOTHING], 5):
        assert len(ranking.rows) == len(ranking.scores) == 0


def test_a_vector_or_query_of_nan_is_never_found_and_spoils_no_other() -> None:
    vectors, queries = random_units(16, 40), random_units(17, 3)
    everything = np.arange(40)
    [clean] = ResidentVectors.upload(vectors, "cpu", "float32").search(queries[2:], [everything], 40, -1.0)
    vectors[7], queries[1] = np.nan, np.nan
    resident = ResidentVectors.upload(vectors, "cpu", "float32")
    found = resident.search(queries, [everything] * 3, 5, -1.0)
    assert found[1].rows.tolist() == []
    assert found[2].rows.tolist() == [row for row in clean.rows.tolist() if row != 7][:5]


def test_the_least_score_is_excluded_itself() -> None:
    index = DeviceIndex(np.eye(4, dtype=np.float32), device="cpu")
    query = np.array([[0.5, 0.25, 0.75, 0.0]], dtype=np.float32)
    assert index.search(query, [np.arange(4)], 9, 0.25)[0].rows.tolist() == [2, 0]


def test_arrays_that_may_not_be_written_to_are_read_without_a_warning() -> None:
    vectors, queries = random_units(28, 20), random_units(29, 2)
    vectors.flags.writeable = queries.flags.writeable = False
    found = DeviceIndex(vectors, device="cpu").search(queries, [np.arange(20)] * 2, 3, -1.0)
    assert [len(ranking.rows) for ranking in found] == [3, 3]


def test_foreign_rows_and_queries_of_another_shape_are_refused() -> None:
    index = DeviceIndex(random_units(18, 40), device="cpu")
    for row in (-1, 40):
        with pytest.raises(IndexError, match="expected 0 to 39"):
            index.search(random_units(19, 1), [np.array([row])], 5)
    with pytest.raises(ValueError, match=r"queries \(1, 47\) for 1 scopes; expected \[1, 48\]"):
        index.search(random_units(20, 1, dim=47), [np.arange(3)], 5)
    with pytest.raises(ValueError, match="for 1 scopes"):
        index.search(random_units(21, 2), [np.arange(3)], 5)


def test_postfilter_and_unscoped_search_answer_as_on_the_host(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", random_units(22, 300))
    host, queries, allowed = (
        VectorIndex.open(tmp_path / "vectors.npy"),
        random_units(23, 9),
        scopes(24, 9, 300),
    )
    index = DeviceIndex.open_on(tmp_path / "vectors.npy", "cpu")
    for mine, other in (
        (
            index.search(queries, allowed, 50, mode="postfilter:60"),
            host.search(queries, allowed, 50, mode="postfilter:60"),
        ),
        (index.search_all(queries, 9), host.search_all(queries, 9)),
    ):
        assert [r.rows.tolist() for r in mine] == [r.rows.tolist() for r in other]
    with pytest.raises(ValueError, match="mode 'fast' is unknown"):
        index.search(queries, allowed, 50, mode="fast")


def test_a_searcher_finds_the_same_documents_through_a_device_index(tmp_path: Path) -> None:
    encoder = WordEncoder()
    host = build_searcher(tmp_path, encoder)
    index = DeviceIndex.open_on(tmp_path / "vectors.npy", "cpu")
    queries = [
        Query("the glacier in the north", "even", 48),
        Query("library", "none", 3),
        Query("road", "all", 48),
    ]
    vectors = encoder.encode(encoder.tokenize([query.text for query in queries]))
    mine = Searcher(host.corpus, index, host.scopes, encoder.dim, FILTERS).answer(queries, vectors)
    for hits, expected in zip(mine, host.answer(queries, vectors), strict=True):
        assert sorted(hit.document_id for hit in hits) == sorted(hit.document_id for hit in expected)
    assert [len(hits) > 0 for hits in mine] == [True, False, True]


def test_a_device_that_is_not_there_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="device 'cuda:99' cannot hold the vectors"):
        DeviceIndex(random_units(25, 3), device="cuda:99")


INTERPRETED = """
import numpy as np, torch
from ray_app.retrieval import gpu_kernel
from ray_app.retrieval.gpu import ResidentVectors
from tests.retrieval.test_gpu import NOTHING, random_units

for dim in (48, 512, 700):
    for precision in ("float16", "bfloat16", "float32"):
        resident = ResidentVectors.upload(random_units(26, 60, dim), "cpu", precision)
        packed = resident.pack([NOTHING, np.arange(0, 60, 3), np.array([59]), np.arange(8), NOTHING])
        queries = torch.from_numpy(random_units(27, 5, dim))
        scored = gpu_kernel.score_scopes(resident.vectors, queries, *packed)
        torch.testing.assert_close(scored, resident.scores(queries, packed), rtol=0, atol=1e-6)
        print(dim, precision)
"""


def test_the_triton_kernel_scores_as_plain_torch_does() -> None:
    pytest.importorskip("triton")
    # Triton's interpreter runs the kernel on the CPU, if it is chosen before Triton is imported.
    ended = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 9
