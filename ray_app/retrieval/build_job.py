"""Builds an index with the whole cluster: every GPU, or, without GPUs, every CPU embeds.

Owns the workers: how many there are, what each gets, what replaces a dead one. Only the driver reads the
corpus and writes the folder, so nodes need share none, and a dead worker leaves no half of a file. Texts and
vectors travel through Ray's object store: 50,000 documents of 1.7 kB and vectors of 1024 dimensions a second,
measured with an encoder that costs nothing. A worker on CPUs has one CPU and one thread: the last bits of a
vector change with the threads that share a sum, and must not with the number of workers; and threads of
several workers fight, on a busy machine two workers did 66 documents/s where one of two threads did 21 to 81.

Refused: an encoder that calls itself something else than what was asked for. Not covered: a worker that
hangs without dying, and nodes that an autoscaler would add.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from ray_app.errors import ConfigError, EvalError, InfrastructureError
from ray_app.retrieval.build import DOCUMENT_BATCH, Build, embed, opened
from ray_app.retrieval.encoder import BUNDLED, Dtype, Encoder, FloatArray, encoder_label, load_encoder

Device = Literal["auto", "cpu", "cuda"]
Say = Callable[[str], None]

# Shards at each worker: one that it embeds, and one whose texts are there when that is done.
AHEAD = 2
# Workers that may die over one shard, and starts of a worker in a row that come to nothing.
TRIES = 3
POLL_S = 1.0
SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class Order:
    """What is to be built, where, and on what."""

    corpus_jsonl: Path
    out: Path
    encoder: str = BUNDLED
    dtype: Dtype = "float32"
    truncate_dim: int | None = None
    device: Device = "auto"
    batch: int = DOCUMENT_BATCH
    cpus_per_worker: int = 1
    is_forced: bool = False

    @property
    def label(self) -> str:
        return encoder_label(self.encoder, self.dtype, self.truncate_dim)


class Patience(NamedTuple):
    """How long a build waits while others hold every CPU or GPU.

    Without a CPU of its own it goes on all the same: who holds them may be the replica that waits for this
    very index. Without a GPU it fails; None: it waits for ever.
    """

    cpu_s: float = 20.0
    gpu_s: float | None = None


PATIENCE = Patience()


class Host(NamedTuple):
    """A node's name and its resources as Ray counts them."""

    name: str
    cpus: float
    gpus: float


class Crew(NamedTuple):
    """The workers of a build: what they compute on, and how many there are at most."""

    device: Literal["cpu", "cuda"]
    size: int


def carry_out(
    order: Order, say: Say, connect: Callable[[], None] = lambda: None, patience: Patience = PATIENCE
) -> None:
    """Builds what is missing of the index and says how it goes; `connect` is called before Ray is needed.

    Raises EvalError with one line for the user, InfrastructureError where no GPU becomes free or workers
    die over and over. Whatever ends it, what is embedded is kept.
    """
    started = time.monotonic()
    _refuse_copy(order.out, os.environ)
    with opened(
        order.corpus_jsonl, order.out, order.label, order.batch, is_forced=order.is_forced, say=say
    ) as build:
        if build is None:
            say(f"index: {order.out} holds this index already; nothing to do")
            return
        if build.missing:
            connect()
            embed_missing(build, order, say, patience)
        manifest = build.publish()
    say(
        f"index: {manifest['documents']} documents, {manifest['dim']} dimensions, "
        f"{time.monotonic() - started:.0f} s, at {order.out}"
    )


def embed_missing(build: Build, order: Order, say: Say, patience: Patience = PATIENCE) -> None:
    """Has every missing shard of `build` embedded by the cluster's workers. Needs a connected Ray."""
    here, cores = socket.gethostname(), os.cpu_count() or 1
    crew = crew_for(cluster_hosts(), order.device, order.cpus_per_worker, here=here, cores_here=cores)
    crew = crew._replace(size=min(crew.size, len(build.missing)))
    kept = f", {build.done} are there from an earlier start" if build.done else ""
    say(
        f"index: {len(build) - build.done} of {len(build)} documents to embed with {order.label}{kept}; "
        f"workers: {crew.size} on {'GPUs' if crew.device == 'cuda' else 'CPUs'}"
    )
    _Embedding(build, order, crew, say, patience).run()


def crew_for(
    hosts: Sequence[Host], device: Device, cpus_per_worker: int, *, here: str, cores_here: int
) -> Crew:
    """A worker for each GPU; without GPUs one for each `cpus_per_worker` whole CPUs of a node.

    On the machine `here` no more than its `cores_here`: a cluster that a job starts has more CPUs than
    those. Raises ConfigError where a GPU is asked for that nobody has.
    """
    gpus = sum(int(host.gpus) for host in hosts)
    if device == "cuda" and not gpus:
        raise ConfigError("--device cuda: no node of this cluster has a GPU; use --device cpu or auto")
    if device != "cpu" and gpus:
        return Crew("cuda", gpus)
    places: Counter[str] = Counter()
    for host in hosts:
        places[host.name] += int(host.cpus) // cpus_per_worker
    if places[here]:
        places[here] = min(places[here], max(1, cores_here // cpus_per_worker))
    if not places.total():
        most = max((int(host.cpus) for host in hosts), default=0)
        raise ConfigError(f"--cpus-per-worker {cpus_per_worker}: the largest node has {most} CPUs")
    return Crew("cpu", places.total())


class Embedder:
    """The worker actor: loads the encoder once, then embeds one shard after the other."""

    def __init__(self, order: Order, device: str) -> None:
        self._order, self._device = order, device
        self._encoder: Encoder | None = None

    def started(self) -> None:
        """Answers as soon as the worker has its CPUs or its GPU."""

    def load(self) -> str:
        """Loads the encoder; what it calls itself."""
        order = self._order
        threads = order.cpus_per_worker if self._device == "cpu" else None
        self._encoder = load_encoder(
            order.encoder,
            device=self._device,
            threads=threads,
            dtype=order.dtype,
            truncate_dim=order.truncate_dim,
        )
        return self._encoder.name

    def embed(self, texts: list[str]) -> FloatArray:
        """Vectors of one shard's texts."""
        assert self._encoder is not None  # `load` is the call before
        return embed(self._encoder, texts, self._order.batch)


@dataclass(eq=False)
class _Worker:
    """One actor. `failures`: starts in a row, its predecessors' included, without a shard finished."""

    actor: Any
    failures: int = 0
    is_started: bool = False
    is_ready: bool = False
    shards: deque[int] = field(default_factory=deque)  # at it, in the order in which it embeds them


class _Call(NamedTuple):
    worker: _Worker
    take: Callable[[Any], None]  # what to do with its answer


class _Embedding:
    """Hands the missing shards to workers, a bounded number at a time, and keeps what comes back."""

    def __init__(self, build: Build, order: Order, crew: Crew, say: Say, patience: Patience) -> None:
        self._build, self._order, self._crew, self._say = build, order, crew, say
        self._todo = deque(sorted(build.missing))
        self._workers: list[_Worker] = []
        self._calls: dict[Any, _Call] = {}
        self._deaths: Counter[int] = Counter()
        self._cpus = order.cpus_per_worker
        self._watch = _Watch(build, say)
        self._had_worker_at, self._patience = time.monotonic(), patience

    def run(self) -> None:
        try:
            for _ in range(self._crew.size):
                self._start()
            while self._build.missing:
                self._hand_out()
                self._take_in()
                if any(worker.is_started for worker in self._workers):
                    self._had_worker_at = time.monotonic()
                    self._watch.tick()
                else:
                    self._wait(time.monotonic() - self._had_worker_at)
        finally:
            for worker in self._workers:
                ray.kill(worker.actor)

    def _start(self, failures: int = 0) -> None:
        # A GPU worker needs no CPU of its own: it would wait for one beside an idle GPU.
        needs = {"num_gpus": 1, "num_cpus": 0} if self._crew.device == "cuda" else {"num_cpus": self._cpus}
        options = ray.remote(Embedder).options(**needs, scheduling_strategy="SPREAD")
        worker = _Worker(options.remote(self._order, self._crew.device), failures)
        self._workers.append(worker)

        def started(_: None) -> None:
            worker.is_started = True

        def loaded(name: str) -> None:
            self._check(name)
            worker.is_ready = True
            self._watch.begin()

        self._calls[worker.actor.started.remote()] = _Call(worker, started)
        self._calls[worker.actor.load.remote()] = _Call(worker, loaded)

    def _check(self, name: str) -> None:
        if name != self._order.label:
            raise ConfigError(
                f"encoder {self._order.label!r} calls itself {name!r}, so its index would not be found "
                "again; give it the name that it is asked for by"
            )

    def _hand_out(self) -> None:
        for ahead in range(AHEAD):  # the first to everybody, before anybody gets a second
            for worker in self._workers:
                if self._todo and worker.is_ready and len(worker.shards) == ahead:
                    self._give(worker, self._todo.popleft())

    def _give(self, worker: _Worker, shard: int) -> None:
        def embedded(vectors: FloatArray) -> None:
            self._build.keep(shard, vectors)
            worker.shards.remove(shard)
            worker.failures = 0

        worker.shards.append(shard)
        self._calls[worker.actor.embed.remote(self._build.texts(shard))] = _Call(worker, embedded)

    def _take_in(self) -> None:
        """Waits for one answer, POLL_S at most. The earlier call comes first, where several are there."""
        done, _ = ray.wait(list(self._calls), timeout=POLL_S)
        for reference in done:
            call = self._calls.pop(reference)
            try:
                answer = ray.get(reference)
            except RayError as error:
                if isinstance(error, RayTaskError) and isinstance(error.cause, EvalError):
                    raise error.cause from None
                self._lose(call.worker, _reason(error))
            else:
                call.take(answer)

    def _lose(self, worker: _Worker, reason: str) -> None:
        """Its shards go to others, and another worker takes its place, for a number of times."""
        self._workers.remove(worker)
        ray.kill(worker.actor)  # one that only raised may be of no use any more, as after a CUDA error
        self._calls = {key: call for key, call in self._calls.items() if call.worker is not worker}
        self._todo.extendleft(reversed(worker.shards))
        self._say(f"index: a worker was lost ({reason}); what it held goes to another")
        if worker.shards:
            self._blame(worker.shards[0], reason)
        if worker.failures + 1 < TRIES:
            self._start(worker.failures + 1)
        elif not self._workers:
            raise InfrastructureError(
                f"no worker can embed, {TRIES} starts in a row failed; the last: {reason}"
            )

    def _blame(self, shard: int, reason: str) -> None:
        self._deaths[shard] += 1
        if self._deaths[shard] == TRIES:
            rows = self._build.shards[shard]
            first, longest = self._build.corpus.ids[rows[0]], self._build.corpus.chars[rows].max()
            raise InfrastructureError(
                f"{TRIES} workers were lost over the same {len(rows)} documents (first: {first}, up to "
                f"{longest} characters), the last: {reason}; try a smaller --batch or more --cpus-per-worker"
            )

    def _wait(self, waited_s: float) -> None:
        """No worker has started: others hold what they need."""
        is_gpu = self._crew.device == "cuda"
        self._watch.waiting("GPU" if is_gpu else "CPU", waited_s)
        if is_gpu and waited_s > (self._patience.gpu_s or float("inf")):
            raise InfrastructureError(
                f"no GPU became free in {waited_s:.0f} s; end what holds them (`ray status`), then try again"
            )
        if not is_gpu and self._cpus and waited_s > self._patience.cpu_s:
            self._say("index: no CPU became free; a worker without one of its own goes on")
            self._cpus = 0
            self._start()


class _Watch:
    """Says how far a build is, every SAY_EVERY_S."""

    def __init__(self, build: Build, say: Say, timer: Callable[[], float] = time.monotonic) -> None:
        self._build, self._say, self._timer = build, say, timer
        self._done_before, self._said = build.done, timer()
        self._began: float | None = None

    def begin(self) -> None:
        """The first worker has its encoder."""
        if self._began is None:
            self._began = self._said = self._timer()

    def tick(self) -> None:
        done, total, now = self._build.done, len(self._build), self._timer()
        if now - self._said < SAY_EVERY_S and (done < total or self._began is None):
            return
        self._said = now
        if self._began is None:
            self._say("index: the encoder is being loaded")
            return
        per_s = (done - self._done_before) / max(now - self._began, 1e-9)
        # The longest texts come first, so the rate only rises.
        left = f"at most {(total - done) / per_s:.0f} s left" if per_s else "no shard done yet"
        self._say(f"index: {done} of {total} documents embedded, {per_s:.0f}/s, {left}")

    def waiting(self, what: str, waited_s: float) -> None:
        if waited_s > SAY_EVERY_S and self._timer() - self._said >= SAY_EVERY_S:
            self._said = self._timer()
            self._say(f"index: waiting for a free {what} (`ray status` tells who holds them)")


def _reason(error: RayError) -> str:
    """What happened, in a sentence: Ray's own message goes on about everything that may be behind it."""
    if isinstance(error, RayTaskError):
        return " ".join(f"{type(error.cause).__name__}: {error.cause}".split())[:300]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].split(". ")[0][:300]


def cluster_hosts() -> list[Host]:
    """The nodes that are alive."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [
        Host(node["NodeManagerHostname"], node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in nodes
    ]


def _refuse_copy(out: Path, environ: Mapping[str, str]) -> None:
    """A job submitted with a working directory runs in a copy of it, which Ray deletes."""
    job = json.loads(environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    if (job.get("runtime_env") or {}).get("working_dir") and Path.cwd() in out.absolute().parents:
        raise ConfigError(
            f"--out {out} is inside the copy of the working directory that Ray deletes; give an absolute path"
        )
