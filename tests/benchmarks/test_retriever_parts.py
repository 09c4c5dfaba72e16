from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest

from benchmarks.child import Child
from benchmarks.reference_retriever import DatasetRows, keep
from benchmarks.retriever_data import EMPTY_EIDS, Data, Query, Sizes, draw_scopes, prepare, spread_ids
from benchmarks.retriever_load import Clients
from benchmarks.retriever_memory import write_index
from benchmarks.retriever_oracle import TOP_K, Oracle
from benchmarks.retriever_processes import kind_of
from benchmarks.serve_retriever import serve_environ
from benchmarks.stub_encoder import CHARS_PER_TOKEN, NOOP, Cost, StubEncoder, noop
from ray_app.retrieval.build import CORPUS
from ray_app.retrieval.corpus import Corpus
from ray_app.retrieval.search import MIN_CHARS

WORDS = ["".join(letters) for letters in product("abcdef", repeat=3)]
TINY = Sizes(rows=2000, questions=20, queries=64)
LONG = "x" * (MIN_CHARS + 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return prepare(tmp_path_factory.mktemp("data"), TINY, noop(), WORDS)


# The oracle: rows 0 .. 3 score 0.9, 0.7, 0.5 and 0.05 for the query [1, 0].
VECTOR = np.array([1, 0], dtype=np.float32)
VECTORS = np.array([[0.9, 0.4], [0.7, 0.7], [0.5, 0.8], [0.05, 1]], dtype=np.float32)
IDS = np.array([100, 101, 102, 103], dtype=np.int64)


def oracle(eligible: Sequence[bool] = (True, True, True, True), rows: Sequence[int] = (0, 1, 2, 3)) -> Oracle:
    return Oracle(VECTORS, IDS, np.array(eligible), {"q": np.array(rows, dtype=np.int64)})


@pytest.mark.parametrize(
    ("found", "missed"),
    [([100, 101, 102], 0), ([102, 100, 101], 0), ([100, 102], 1), ([100, 100, 100], 2), ([], 3)],
)
def test_the_oracle_wants_every_row_of_the_scope_that_scores_enough(found: list[int], missed: int) -> None:
    assert oracle().missed(Query("any", "q"), VECTOR, found) == (missed, 3)


def test_the_oracle_wants_neither_short_texts_nor_rows_of_other_scopes() -> None:
    query = Query("any", "q")
    assert oracle(eligible=(False, True, True, True)).missed(query, VECTOR, [101, 102]) == (0, 2)
    assert oracle(rows=(1, 3)).missed(query, VECTOR, [101]) == (0, 1)
    assert oracle(rows=(1, 3)).missed(query, VECTOR, [100]) == (1, 1)
    assert oracle().missed(Query("any", "unknown"), VECTOR, []) == (0, 0)


def test_a_hit_that_scores_like_the_last_wanted_one_stands_for_it() -> None:
    ids = np.arange(TOP_K + 1, dtype=np.int64)
    vectors = np.tile(np.array([0.5, 0.5], dtype=np.float32), (TOP_K + 1, 1))
    judge = Oracle(vectors, ids, np.full(TOP_K + 1, True), {"q": ids})
    assert judge.missed(Query("any", "q"), VECTOR, list(range(1, TOP_K + 1))) == (0, TOP_K)


def test_recall_is_the_share_of_all_wanted_hits_that_were_found() -> None:
    queries = [Query("any", "q"), Query("any", "q"), Query("any", "unknown")]
    vectors = np.tile(VECTOR, (3, 1))
    assert oracle().recall(queries, vectors, [[100, 101, 102], [100], []]) == pytest.approx(4 / 6)


class ListedRows:
    """Rows of (id, text)."""

    def __init__(self, *rows: tuple[int, str]) -> None:
        self._rows = rows

    def id_of(self, row: int) -> int:
        return self._rows[row][0]

    def document(self, row: int) -> dict[str, Any]:
        return dict(zip(("id", "content"), self._rows[row], strict=True))


def test_the_reference_keeps_what_is_allowed_scored_and_long_enough_in_the_order_of_the_ranking() -> None:
    rows = ListedRows((7, LONG), (8, LONG), (9, LONG[1:]), (5, LONG), (6, LONG))
    hits = keep(rows, [0.9, 0.8, 0.7, 0.5, 0.1], [1, 0, 2, 3, 4], {5, 6, 7, 9}, 10)
    assert [(hit["document"]["id"], hit["score"]) for hit in hits] == [(7, 0.8), (5, 0.5)]
    assert [hit["document"]["id"] for hit in keep(rows, [0.9, 0.8], [0, 1], {7, 8}, 1)] == [7]


def test_rows_of_a_dataset_are_those_of_the_corpus(data: Data, tmp_path: Path) -> None:
    rows, corpus = DatasetRows(data.jsonl, tmp_path), Corpus.open(data.folder / CORPUS)
    for row in (0, 1, 999, TINY.rows - 1):
        assert rows.id_of(row) == corpus.ids[row]
        assert rows.document(row) == {"id": corpus.ids[row], "content": corpus.text(row)}
    assert rows.document(3)["id"] == corpus.ids[3]  # without asking for its id before


@pytest.mark.parametrize("text", ["", "20", "20,0.02,1", "20;0.02", "a,b"])
def test_a_cost_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="expected two numbers"):
        Cost.parse(text)


def test_a_cost_is_read_as_it_is_written_and_counts_padding() -> None:
    cost = Cost.parse("20,0.02")
    assert cost == Cost(20, 0.02) == Cost.parse(str(cost))
    assert cost.seconds(items=64, longest=50) == pytest.approx(0.084)


def test_a_stub_takes_its_time_and_knows_texts_by_themselves() -> None:
    stub = StubEncoder(Cost(batch_ms=30))
    tokens = stub.tokenize(["one", "two", "x" * (3 * CHARS_PER_TOKEN)])
    assert [len(each) for each in tokens] == [1, 1, 3]
    began = time.perf_counter()
    vectors = stub.encode(tokens)
    assert time.perf_counter() - began >= 0.03
    assert np.array_equal(vectors[1], stub.encode(tokens[1:2])[0])
    assert not np.array_equal(vectors[0], vectors[1])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


def test_scopes_have_the_sizes_of_the_map_and_rows_only_once() -> None:
    scopes = draw_scopes(np.random.default_rng(0), 1900, 176_522)
    sizes = sorted(len(rows) for rows in scopes)
    assert sizes[len(sizes) // 2] == pytest.approx(100, abs=3)
    assert sizes[-1] == 675
    assert sizes[len(sizes) * 9 // 10] == pytest.approx(163, abs=5)
    assert all(np.all(np.diff(rows) > 0) for rows in scopes)


@pytest.mark.parametrize("rows", [10, 2000, 7919 * 2])
def test_ids_are_no_rows_and_each_is_used_once(rows: int) -> None:
    assert sorted(spread_ids(rows).tolist()) == list(range(rows))
    assert not np.array_equal(spread_ids(rows), np.arange(rows))


def test_data_are_made_once_and_the_same_again(data: Data, tmp_path: Path) -> None:
    made_at = (data.folder / CORPUS).stat().st_mtime_ns
    assert prepare(data.folder.parent, TINY, noop(), []).queries == data.queries
    assert (data.folder / CORPUS).stat().st_mtime_ns == made_at
    again = prepare(tmp_path, TINY, noop(), WORDS)
    assert again.queries == data.queries
    assert np.array_equal(np.load(again.vectors), np.load(data.vectors))


def test_the_scope_map_names_the_documents_of_the_rows_and_some_of_them_twice(data: Data) -> None:
    listed, corpus = json.loads(data.examples.read_text()), Corpus.open(data.folder / CORPUS)
    places = data.scope_rows()
    assert set(listed) == {*places, *EMPTY_EIDS}
    for eid, rows in places.items():
        assert set(listed[eid]) == set(corpus.ids[rows].tolist())
        assert len(listed[eid]) == int(len(rows) * 1.68)
    assert {query.eid for query in data.queries} <= set(places)
    assert len({query.text for query in data.queries}) == TINY.queries


def test_questions_of_the_memory_index_share_no_document(tmp_path: Path) -> None:
    eids = write_index(tmp_path / "many", documents=1500, winners=1000)
    listed = json.loads((tmp_path / "many" / "examples.json").read_text())
    assert len({each for eid in eids for each in listed[eid]}) == 1000
    assert {len(Corpus.open(tmp_path / "many" / CORPUS).text(row)) for row in (0, 1499)} == {2000}
    # With too few documents, the questions ask for as many and share them.
    eids = write_index(tmp_path / "few", documents=100, winners=1000)
    listed = json.loads((tmp_path / "few" / "examples.json").read_text())
    assert sum(len(set(listed[eid])) for eid in eids) > 700
    assert {each for eid in eids for each in listed[eid]} == set(range(100))


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (["ray::ServeReplica:minilm:retriever"], "replica"),
        (["/tmp/x/haproxy", "-db"], "HAProxy"),
        (["ray::HAProxyManager.ready"], "HAProxy's manager"),
        (["ray::ProxyActor"], "Serve's proxy"),
        (["/usr/bin/raylet", "--x"], "rest of Ray"),
        ([], "rest of Ray"),
    ],
)
def test_processes_are_told_apart_by_their_names(command: list[str], kind: str) -> None:
    assert kind_of(command) == kind


def test_haproxy_listens_on_loopback_alone(tmp_path: Path) -> None:
    environ = serve_environ(tmp_path, "/bin/echo")
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "  bind *:8404\n  bind :9101 x\n bind 127.0.0.1:8000\n  server s 10.0.0.1:1 # bind *:1\n"
    )
    arguments = [environ["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config)]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert ran.stdout == f"-db -f {config}\n"
    lines = config.read_text().splitlines()
    assert lines[:2] == ["  bind 127.0.0.1:8404", "  bind 127.0.0.1:9101 x"]
    assert lines[2:] == [" bind 127.0.0.1:8000", "  server s 10.0.0.1:1 # bind *:1"]


def test_without_haproxy_serve_has_its_own_proxy(tmp_path: Path) -> None:
    assert not [name for name in serve_environ(tmp_path, None) if "HA_PROXY" in name or "HAPROXY" in name]


async def test_the_stub_of_the_web_takes_its_time_and_ends_with_its_parent() -> None:
    with Child("benchmarks.stub_web", {"search_s": 0.05, "page_s": 0.1}) as child:
        url, process = child.started().hello["url"], psutil.Process(child.pid)
        async with aiohttp.ClientSession() as session:
            began = time.perf_counter()
            async with session.post(f"{url}/search", json={"query": "x"}) as reply:
                found = (await reply.json())["results"]
            async with session.post(f"{url}/extract", json={"urls": [found[0]["url"]]}) as reply:
                [page] = (await reply.json())["results"]
            assert time.perf_counter() - began >= 0.15
    assert page["url"] == found[0]["url"]
    assert len(page["raw_content"]) > MIN_CHARS
    assert not process.is_running()


def test_a_child_that_cannot_start_is_no_silence() -> None:
    with Child("benchmarks.stub_web", {"unknown": 1}) as child, pytest.raises(RuntimeError, match="ended"):
        child.started()


@dataclass(frozen=True)
class Loaded:
    """What one job against one server gave."""

    measured: dict[str, Any]
    recall: float
    mean_batch: float


@asynccontextmanager
async def clients_of(data: Data) -> AsyncIterator[Clients]:
    clients = Clients(list(data.queries))
    try:
        yield clients
    finally:
        await clients.close()


def server(module: str, data: Data, **given: Any) -> Child:
    return Child(module, {"folder": str(data.folder), "encoder": NOOP, "threads": 1, **given})


async def load(data: Data, url: str, **job: Any) -> Loaded:
    """One job, its answers judged."""
    async with clients_of(data) as clients:
        measured = await clients.ask({"to": url, "start": 0, "keep": 10_000, **job})
        counted = await clients.ask({"stats": url})
    corpus, encoder = Corpus.open(data.folder / CORPUS), noop()
    vectors = np.load(data.vectors)
    judge = Oracle(vectors, corpus.ids, corpus.chars > MIN_CHARS, data.scope_rows())
    numbers = sorted(measured["kept"])
    queries = [data.queries[number % len(data.queries)] for number in numbers]
    encoded = encoder.encode(encoder.tokenize([query.text for query in queries]))
    recall = judge.recall(queries, encoded, [measured["kept"][number] for number in numbers])
    return Loaded(measured, recall, counted["queries"] / counted["batches"])


@pytest.fixture(scope="module")
def plain_url(data: Data) -> Iterator[str]:
    with server("benchmarks.plain_retriever", data, limits={"waiting": 64}) as child:
        yield child.started().hello["url"]


async def test_the_plain_server_finds_all_that_the_oracle_wants(data: Data, plain_url: str) -> None:
    loaded = await load(data, plain_url, clients=8, count=len(data.queries))
    assert loaded.measured["errors"] == {}
    assert len(loaded.measured["latencies_s"]) == len(loaded.measured["kept"]) == len(data.queries)
    assert max(loaded.measured["latencies_s"]) <= loaded.measured["seconds"]
    assert loaded.recall == 1
    assert 1 <= loaded.mean_batch <= 8


async def test_a_job_that_has_a_time_ends_with_it(data: Data, plain_url: str) -> None:
    loaded = await load(data, plain_url, clients=2, count=10_000_000, seconds=0.2)
    assert 0.2 <= loaded.measured["seconds"] < 2
    assert len(loaded.measured["latencies_s"]) > 2


async def test_queries_beside_the_clients_are_told_apart(data: Data, plain_url: str) -> None:
    extra = [(data.queries[0].text, data.queries[0].eid)] * 3
    loaded = await load(data, plain_url, clients=4, count=8, extra=extra)
    assert len(loaded.measured["extra_s"]) == 3
    assert len(loaded.measured["latencies_s"]) == 8


async def test_requests_that_fail_are_counted_by_their_message(data: Data, plain_url: str) -> None:
    loaded = await load(data, plain_url, clients=2, count=4, extra=[("words", "no such question")])
    assert [(message[:27], times) for message, times in loaded.measured["errors"].items()] == [
        ("extra: RuntimeError: HTTP 4", 1)
    ]


async def test_a_depth_that_ends_before_the_scope_costs_the_reference_its_recall(data: Data) -> None:
    given: dict[str, Any] = {"rows": "ids", "cache_dir": ""}
    deep = server("benchmarks.reference_retriever", data, knobs={"depth": TINY.rows}, **given)
    shallow = server("benchmarks.reference_retriever", data, knobs={"depth": 100}, **given)
    with deep, shallow:
        urls = [child.started().hello["url"] for child in (deep, shallow)]
        whole, part = await asyncio.gather(
            *(load(data, url, clients=8, count=len(data.queries)) for url in urls)
        )
    assert whole.measured["errors"] == part.measured["errors"] == {}
    assert whole.recall == 1
    assert part.recall < 0.95


async def test_a_fallback_of_the_reference_holds_up_everybody(data: Data) -> None:
    knobs = {"depth": 100, "fallback_s": 0.3}
    with server("benchmarks.reference_retriever", data, knobs=knobs, rows="ids", cache_dir="") as child:
        url = child.started().hello["url"]
        loaded = await load(data, url, clients=2, count=100_000, seconds=0.5, extra=[("web", EMPTY_EIDS[0])])
    assert loaded.measured["extra_s"][0] >= 0.3
    assert max(loaded.measured["latencies_s"]) >= 0.2
