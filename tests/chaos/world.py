"""What all rounds of a pass share: cluster and services, the witness, storage, the outside."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ray_app import object_store
from tests.chaos.clock import Clock, clock
from tests.chaos.disk import Disk, disk
from tests.chaos.job import Carried, carried
from tests.chaos.outside import Bucket, Web, bucket, web
from tests.chaos.plan import Benchmark, Kind, Round, Storage
from tests.chaos.unavailable import Unavailable
from tests.jobs.cluster import Cluster, finished, made
from tests.jobs.kills import Answer, Told, Witness, titled, witness
from tests.s3_server import BUCKET

# Long enough for several calls of each task to be in flight when a blow comes.
LATENCY_S = 0.15
DIALOGUES = 20
SCRIPTS = {"hle": "jobs/hle.py", "tau2": "jobs/tau2.py"}
SERVICES = (
    "ray::ServeController",
    "ray::ProxyActor",
    "ray::ServeReplica:baseline",
    "ray::ServeReplica:retriever",
)
UP_S = 120.0
# A driver waits for a cluster that is gone for so long, and not for a minute; Serve makes a proxy that died
# again after three looks, ten seconds apart by itself.
NOTICED_SOON = {"TOOLORCH_CLUSTER_LOST_S": "8", "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1"}


@dataclass
class World:
    """One cluster that is hit again and again, and what stands beside it and is no part of it."""

    cluster: Cluster
    witness: Witness
    bucket: Bucket
    web: Web
    folder: Path
    disk: Disk | None = None
    # Of the driver, and of the second node.
    clocks: tuple[Clock, Clock] | None = None
    unavailable: dict[Kind, str] = field(default_factory=dict)
    expected: dict[tuple[Benchmark, int], Expected] = field(default_factory=dict)

    def run_dir(self, storage: Storage, name: str) -> str:
        """A place for a run, as its user types it."""
        if storage == "s3":
            return f"s3://{BUCKET}/{name}"
        if storage == "disk" and self.disk is not None:
            return str(self.disk.folder / name)
        return str(self.folder / "runs" / name)

    def arguments(self, benchmark: Benchmark, tasks: int, run_dir: str, concurrency: int) -> list[str]:
        size = ("--limit", f"{tasks}") if benchmark == "hle" else ("--trials", f"{tasks // DIALOGUES}")
        return [
            *("--run-dir", run_dir, *size),
            *("--set", f"models.baseline.endpoints=[{{base_url: {self.witness.url}}}]"),
            *("--set", f"concurrency={concurrency}"),
        ]

    @contextmanager
    def carried(self, one: Round, run_dir: str, concurrency: int, log: Path) -> Iterator[Carried]:
        """The command of a round on `run_dir`, started; killed where it is left."""
        arguments = self.arguments(one.benchmark, one.tasks, run_dir, concurrency)

        def popen(*words: str, **environ: str) -> subprocess.Popen[str]:
            return self.cluster.job(*words, script=SCRIPTS[one.benchmark], **environ)

        environ = self.clocks[0].environ if self.clocks else {}
        with carried(popen, arguments, environ, log) as job:
            yield job

    def told(self, run_dir: str) -> Told:
        """What the log of that run says; of an object store, as another machine sees it."""
        return Told(object_store.local(run_dir))

    def learn(self, *all_of: Round) -> None:
        """What undisturbed runs of the same tasks give: made once, and at one time."""
        asked = {(one.benchmark, one.tasks) for one in all_of} - self.expected.keys()
        runs = []
        for benchmark, tasks in sorted(asked):
            run_dir = str(self.folder / "runs" / f"undisturbed-{benchmark}-{tasks}")
            arguments = self.arguments(benchmark, tasks, run_dir, 40)
            runs.append((benchmark, tasks, run_dir, self.cluster.job(*arguments, script=SCRIPTS[benchmark])))
        for benchmark, tasks, run_dir, process in runs:
            output = finished(process)
            found = Expected.of(self.told(run_dir))
            if len(found.answers) != tasks or {answer.outcome for answer in found.answers.values()} != {"ok"}:
                raise RuntimeError(f"the undisturbed run did not end well:\n{output}")
            self.expected[benchmark, tasks] = found

    def heal(self) -> None:
        """Until both nodes and all services are there again."""
        if not self.is_joined("second"):
            self.rejoin("second")
        deadline = time.monotonic() + UP_S
        while missing := [title for title in SERVICES if not titled(self.cluster, title, is_prefix=True)]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the cluster is without {', '.join(missing)} after {UP_S:g} s")
            time.sleep(0.2)

    def is_joined(self, name: str) -> bool:
        parent = self.cluster.parents.get(name)
        return parent is not None and parent.poll() is None and bool(titled(self.cluster, "raylet", name))

    def rejoin(self, name: str) -> None:
        if name in self.cluster.parents:
            self.cluster.kill(name)
        self.cluster.join(name)

    def start_again(self) -> None:
        """A new cluster in the place of one that is gone or does not come back."""
        self.cluster.kill()
        shutil.rmtree(self.cluster.temporary, ignore_errors=True)
        self.cluster.start()


@dataclass(frozen=True)
class Expected:
    """By task and trial: outcome, correctness and words; of a dialogue its last state and what was said; of
    searches how many documents each brought, since a page that is missing need not change an answer."""

    answers: Mapping[tuple[str, int], Answer]
    dialogues: Mapping[tuple[str, int], Any]
    searches: Mapping[tuple[str, int], Any]

    @classmethod
    def of(cls, told: Told) -> Expected:
        return cls(told.answers(), told.dialogues(), told.searches())


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """All of it, up. What `folder` holds afterwards are runs and logs."""
    (folder / "runs").mkdir(parents=True)
    with ExitStack() as stack:
        store, internet = stack.enter_context(bucket()), stack.enter_context(web())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in {**store.environ, "TOOLORCH_HOME": str(folder / "reader")}.items():
            patch.setenv(name, value)
        values = internet.serve_config(folder / "web-cache")
        for app in values["applications"]:
            if app["name"] == "baseline":
                app["args"] = {"latency": {"mean_s": LATENCY_S, "sigma": 0.1}}
        cluster = stack.enter_context(
            made(folder / "cluster", values, {**store.environ, **internet.environ, **NOTICED_SOON})
        )
        found = World(cluster, Witness(""), store, internet, folder)
        try:
            found.disk = stack.enter_context(disk(folder / "disk"))
        except Unavailable as reason:
            found.unavailable |= {"full disk": str(reason), "slow disk": str(reason)}
        try:
            found.clocks = clock(_made(folder / "driver")), clock(_made(folder / "second"))
            cluster.own["second"] = found.clocks[1].environ
        except Unavailable as reason:
            found.unavailable["clock"] = str(reason)
        cluster.start()
        found.witness = stack.enter_context(witness(f"{cluster.http}/baseline"))
        yield found


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
