"""Index building on a real Ray cluster of two CPUs: every death of a worker, and bytes that do not change.

Ray is imported inside functions: its import warns, and warnings of a test module's import are errors before
any mark of the module counts.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from ray_app.errors import ConfigError, DatasetError, InfrastructureError
from ray_app.retrieval.build import CORPUS, MANIFEST, VECTORS, Build, embed, opened, read_manifest
from ray_app.retrieval.encoder import FloatArray, load_encoder
from tests.ray_marks import RAY
from tests.retrieval.data import TOPICS, rows, write_jsonl
from tests.retrieval.stub_encoders import HERE

if TYPE_CHECKING:
    from ray_app.retrieval.build_job import Host, Order, Patience

pytestmark = RAY

# One document at once, shards of eight: six of them.
BATCH = 1
WHOLE = (CORPUS, VECTORS, MANIFEST)


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    import ray

    root = str(Path(__file__).parents[2])
    environ = {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    # The GPU is one by name only: who gets it can be tested, what it computes cannot.
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environ},
    )
    yield
    ray.shutdown()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "c.jsonl", rows())


def order(source: Path, out: Path, encoder: str, **changes: Any) -> Order:
    from ray_app.retrieval.build_job import Order

    name = encoder if encoder == "minilm" else f"{HERE}:{encoder}"
    return Order(source, out, name, **{"device": "cpu", "batch": BATCH, **changes})


def carry_out(asked: Order, patience: Patience | None = None) -> list[str]:
    """What it says."""
    from ray_app.retrieval import build_job

    said: list[str] = []
    build_job.carry_out(asked, said.append, patience=patience or build_job.PATIENCE)
    return said


def workers() -> list[psutil.Process]:
    """The actors' processes: Ray writes the class into their titles."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if _title(process).startswith("ray::Embedder")]


def _title(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline()[:1])
    except psutil.Error:  # it is gone, or nearly
        return ""


class Watched(Build):
    """Does `then` once the first shard is kept: others are under way."""

    def __init__(self, build: Build, then: Callable[[], None]) -> None:
        super().__init__(build.out, build.recipe, build.corpus)
        self._then = then

    def keep(self, shard: int, vectors: FloatArray) -> None:
        is_first = len(self.missing) == len(self.shards)
        super().keep(shard, vectors)
        if is_first:
            self._then()


def test_the_job_writes_the_bytes_of_one_process_also_where_one_is_killed(
    source: Path, tmp_path: Path
) -> None:
    from ray_app.retrieval.build_job import embed_missing

    asked, said, killed = order(source, tmp_path / "job", "minilm"), list[str](), list[int]()

    def kill_one() -> None:
        killed.append(workers()[0].pid)
        os.kill(killed[0], signal.SIGKILL)

    with opened(source, asked.out, "minilm", BATCH) as build:
        assert build is not None
        watched = Watched(build, kill_one)
        embed_missing(watched, asked, said.append)
        watched.publish()
    assert killed and sum("a worker was lost (The actor is dead" in line for line in said) == 1
    alone = tmp_path / "alone"
    with opened(source, alone, "minilm", BATCH) as build, one_thread():
        assert build is not None
        encoder = load_encoder(threads=1)
        for shard in build.missing.copy():
            build.keep(shard, embed(encoder, build.texts(shard), BATCH))
        build.publish()
    for name in WHOLE:
        assert (asked.out / name).read_bytes() == (alone / name).read_bytes()
    assert carry_out(asked) == [f"index: {asked.out} holds this index already; nothing to do"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch as a worker has it: how many threads share a sum can show in its last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_a_job_that_was_stopped_embeds_only_the_rest(source: Path, tmp_path: Path) -> None:
    from ray_app.retrieval.build_job import embed_missing

    asked = order(source, tmp_path / "index", "plain")

    class Stop(BaseException):
        pass

    def stop() -> None:
        raise Stop

    with opened(source, asked.out, asked.label, BATCH) as build, pytest.raises(Stop):
        assert build is not None
        embed_missing(Watched(build, stop), asked, lambda line: None)
    [first, *_, last] = carry_out(asked)
    assert first.startswith("index: 40 of 48 documents to embed with ")
    assert "8 are there from an earlier start" in first
    assert last.startswith("index: 48 documents, 64 dimensions, ") and last.endswith(f" s, at {asked.out}")


def test_parts_that_are_all_there_need_no_worker(source: Path, tmp_path: Path) -> None:
    from ray_app.retrieval.build_job import embed_missing

    asked = order(source, tmp_path / "index", "plain")
    with opened(source, asked.out, asked.label, BATCH) as build:
        assert build is not None
        embed_missing(build, asked, lambda line: None)
    [only] = carry_out(order(source, asked.out, "plain"))
    assert only.startswith("index: 48 documents")


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [("fatal", "its worker process has died;"), ("failing", "MemoryError: no room for this text;")],
)
def test_documents_over_which_workers_die_are_named_and_the_rest_is_kept(
    source: Path, tmp_path: Path, encoder: str, reason: str
) -> None:
    asked = order(source, tmp_path / "index", encoder)
    with pytest.raises(InfrastructureError, match=r"^3 workers were lost over the same 8 documents") as error:
        carry_out(asked)
    assert reason in str(error.value) and "smaller --batch" in str(error.value)
    assert "\n" not in str(error.value)
    with opened(source, asked.out, asked.label, BATCH) as build:
        assert build is not None and 0 < build.done < 48
    healthy = [row for row in rows() if TOPICS[5] not in str(row["content"])]
    carry_out(order(write_jsonl(source, healthy), asked.out, encoder))
    assert read_manifest(asked.out)["documents"] == len(healthy)


def test_an_encoder_that_no_worker_can_load_is_one_line(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match=r"^no worker can embed, .*: this model is broken$"):
        carry_out(order(source, tmp_path / "a", "unloadable"))
    with pytest.raises(ConfigError, match=r"^encoder .*absent'?: .*expected module:factory"):
        carry_out(order(source, tmp_path / "b", "absent"))
    with pytest.raises(ConfigError, match=r"misnamed' calls itself 'words'"):
        carry_out(order(source, tmp_path / "c", "misnamed"))


def test_no_actor_is_left_when_a_build_ends(source: Path, tmp_path: Path) -> None:
    carry_out(order(source, tmp_path / "index", "plain"))
    _, alive = psutil.wait_procs(workers(), timeout=30)
    assert alive == []


@contextmanager
def held(**needs: float) -> Iterator[None]:
    """CPUs or GPUs that somebody else has."""
    import ray

    class Holder:
        def ping(self) -> None:
            pass

    holder = ray.remote(Holder).options(**needs).remote()
    ray.get(holder.ping.remote())
    try:
        yield
    finally:
        ray.kill(holder)


def test_a_build_uses_the_cpu_that_is_free(source: Path, tmp_path: Path) -> None:
    with held(num_cpus=1):
        said = carry_out(order(source, tmp_path / "index", "plain"))
    assert said[0].endswith("workers: 2 on CPUs")
    assert "without one of its own" not in "".join(said)


def test_a_build_goes_on_without_a_cpu_where_others_hold_all(source: Path, tmp_path: Path) -> None:
    from ray_app.retrieval.build_job import Patience

    with held(num_cpus=2):
        said = carry_out(order(source, tmp_path / "index", "plain"), Patience(cpu_s=0.5))
    assert said[1] == "index: no CPU became free; a worker without one of its own goes on"
    assert read_manifest(tmp_path / "index")["documents"] == 48


def test_a_build_without_a_gpu_waits_as_long_as_it_is_told(source: Path, tmp_path: Path) -> None:
    from ray_app.retrieval.build_job import Patience

    asked = order(source, tmp_path / "index", "plain", device="auto")
    with held(num_gpus=1), pytest.raises(InfrastructureError, match=r"^no GPU became free in \d+ s; end "):
        carry_out(asked, Patience(gpu_s=0.5))
    assert carry_out(asked)[0].endswith("workers: 1 on GPUs")


def test_the_service_has_its_index_made_before_it_is_deployed(source: Path, tmp_path: Path) -> None:
    from ray_app.app import RetrieverArgs, retriever

    args = RetrieverArgs(corpus_jsonl=source, cache_dir=tmp_path / "cache", unscoped="search")
    retriever(args)
    [folder] = (tmp_path / "cache").iterdir()
    assert read_manifest(folder)["documents"] == 48
    retriever(args.model_copy(update={"encoder": f"{HERE}:misnamed"}))  # left to the replica
    assert list((tmp_path / "cache").iterdir()) == [folder]
    source.write_text("{broken\n")
    with pytest.raises(DatasetError, match=r"c\.jsonl:1: not JSON"):
        retriever(args)


def hosts(*sizes: tuple[float, float]) -> list[Host]:
    """Nodes of so many CPUs and GPUs."""
    from ray_app.retrieval.build_job import Host

    return [Host(f"node-{number}", *size) for number, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "device", "cpus_per_worker", "expected"),
    [
        ([(8, 0), (4.5, 0)], "auto", 1, ("cpu", 12)),
        ([(8, 0), (7, 0), (1, 0)], "auto", 4, ("cpu", 3)),
        ([(8, 2), (64, 0), (1, 1)], "auto", 1, ("cuda", 3)),
        ([(8, 2)], "cuda", 1, ("cuda", 2)),
        ([(8, 2)], "cpu", 1, ("cpu", 8)),
    ],
)
def test_every_gpu_or_every_cpu_gets_a_worker(
    sizes: list[tuple[float, float]], device: Any, cpus_per_worker: int, expected: tuple[str, int]
) -> None:
    from ray_app.retrieval.build_job import crew_for

    crew = crew_for(hosts(*sizes), device, cpus_per_worker, here="elsewhere", cores_here=1)
    assert crew == expected


def test_a_cluster_with_more_cpus_than_the_machine_has_gets_workers_for_these() -> None:
    from ray_app.retrieval.build_job import crew_for

    for cpus_per_worker, size in ((1, 4 + 2), (2, 2 + 1), (4, 1 + 1)):
        crew = crew_for(hosts((4, 0), (16, 0)), "cpu", cpus_per_worker, here="node-1", cores_here=2)
        assert crew.size == size


def test_the_machine_of_the_driver_is_known_by_its_name() -> None:
    from ray_app.retrieval.build_job import Host, cluster_hosts

    assert cluster_hosts() == [Host(socket.gethostname(), 2, 1)]


def test_what_no_node_has_is_refused() -> None:
    from ray_app.retrieval.build_job import crew_for

    with pytest.raises(ConfigError, match="no node of this cluster has a GPU; use --device cpu or auto"):
        crew_for(hosts((8, 0)), "cuda", 1, here="", cores_here=1)
    with pytest.raises(ConfigError, match="--cpus-per-worker 16: the largest node has 8 CPUs"):
        crew_for(hosts((8, 0), (4, 0)), "auto", 16, here="", cores_here=1)
