"""The blows: what each does to a world while a run goes on, and what it says that it hit."""

from __future__ import annotations

import math
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from tests.chaos.plan import Kind
from tests.jobs.kills import titled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.chaos.job import Carried
    from tests.chaos.world import World

VICTIM_S = 60.0
LIMITS = 0.25
# Longer outages of the web are not waited for: the search says so and goes on with what the corpus has.
WEB_S = 5.0
STEPS_S = (-86_400, -3600, -2, 2, 3600, 86_400)
REPLICAS = {"retriever": "ray::ServeReplica:retriever:retriever", "model": "ray::ServeReplica:baseline"}
STOPPED = ("ray::Worker", "ray::Checkpoint", "driver", "node", *REPLICAS.values())
# A driver whose cluster is gone says so and ends, or it hangs.
NOTICED_S = 30.0


class NoVictim(Exception):
    """Nothing of that kind came up to be hit."""


class Hung(Exception):
    """Something that should have ended by itself did not."""


class Wrong(Exception):
    """Something ended otherwise than it is promised."""


@dataclass(frozen=True)
class Scene:
    """Where a blow strikes: the world, the run that it disturbs, and the chance of this round."""

    world: World
    job: Carried
    rng: random.Random
    outages_s: tuple[float, float]

    def strike(self, kind: Kind) -> str:
        """Strike, undo what the blow holds, start again what only a person would; what was hit, in words."""
        return BLOWS[kind](self)

    def victim(self, title: str, *nodes: str) -> psutil.Process:
        """A process with this title; waited for, where the last one is just being replaced."""
        deadline = time.monotonic() + VICTIM_S
        while not (found := titled(self.world.cluster, title, *nodes, is_prefix=True)):
            if self.job.command.has_ended or time.monotonic() > deadline:
                raise NoVictim(title)
            time.sleep(0.05)
        return self.rng.choice(found)

    def outage_s(self) -> float:
        return self.rng.uniform(*self.outages_s)


def _killed(title: str) -> Callable[[Scene], str]:
    def blow(scene: Scene) -> str:
        victim = scene.victim(title)
        with suppress(psutil.NoSuchProcess):
            victim.kill()
        return f"{title} {victim.pid}"

    return blow


def _checkpoint(scene: Scene) -> str:
    """Or the other actor that a run has beside it: the one that shares limits between runs."""
    title = "ray::SharedLimits" if scene.rng.random() < LIMITS else "ray::Checkpoint"
    return _killed(title)(scene)


def _raylet(scene: Scene) -> str:
    """The node with everything on it, or its raylet alone, which its workers follow."""
    world, is_whole = scene.world, scene.rng.random() < 0.5
    if is_whole:
        world.cluster.kill("second")
    else:
        scene.victim("raylet", "second").kill()
    time.sleep(scene.rng.uniform(0.0, 4.0))  # how long a node is away
    world.rejoin("second")
    return "the second node" if is_whole else "the raylet of the second node"


def _driver(scene: Scene) -> str:
    pid = scene.job.command.process.pid
    scene.job.again()
    return f"driver {pid}"


def _cluster(scene: Scene) -> str:
    """Everything at once; half of the time the driver lives on, to find that out by itself."""
    is_with_driver = scene.rng.random() < 0.5
    if is_with_driver:
        scene.job.command.process.kill()
    scene.world.cluster.kill()
    if not is_with_driver and not scene.job.command.wait(
        lambda: scene.job.command.has_ended, time.monotonic() + NOTICED_S
    ):
        raise Hung(f"the driver goes on {NOTICED_S:g} s after its cluster was killed")
    if not is_with_driver and "error: the Ray cluster at " not in scene.job.command.transcript.read_text():
        raise Wrong("a driver without cluster ended without a word")
    scene.world.start_again()
    scene.job.again()
    return "everything" if is_with_driver else "the cluster, under a driver that lives"


@contextmanager
def _stopped(victims: Sequence[psutil.Process]) -> Iterator[None]:
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGCONT)


def _stop(scene: Scene) -> str:
    """SIGSTOP for a while, then SIGCONT: a process that comes back and knows nothing of it."""
    what, held_s = scene.rng.choice(STOPPED), scene.outage_s()
    if what == "driver":
        victims = [psutil.Process(scene.job.command.process.pid)]
    elif what == "node":
        victims = scene.world.cluster.processes("second")
    else:
        try:
            victims = [scene.victim(what)]
        except NoVictim:  # no retriever is asked in a dialogue
            victims = [scene.victim("ray::Worker")]
    with _stopped(victims):
        time.sleep(held_s)
    if what == "node" and not scene.world.is_joined("second"):
        scene.world.rejoin("second")
    return f"{what} stopped for {held_s:.1f} s"


def _held(scene: Scene, what: str, fault: AbstractContextManager[object], most_s: float = math.inf) -> str:
    """That fault, for a while."""
    held_s = min(scene.outage_s(), most_s)
    with fault:
        time.sleep(held_s)
    return f"{what} for {held_s:.1f} s"


def _web(scene: Scene) -> str:
    """Its deployment dies, or what it pays for is away."""
    kind = scene.rng.choice(("replica", "refused", "failing", "hanging"))
    if kind == "replica":
        return _killed("ray::ServeReplica:retriever:web")(scene)
    web = scene.world.web
    faults = {"refused": web.refused, "failing": web.failing, "hanging": web.hanging}
    return _held(scene, f"the web search was {kind}", faults[kind](), WEB_S)


def _s3(scene: Scene) -> str:
    if scene.rng.random() < 0.5:
        return _held(scene, "the object store stopped", scene.world.bucket.stopped())
    return _held(scene, "the object store refused connections", scene.world.bucket.refused())


def _full_disk(scene: Scene) -> str:
    assert scene.world.disk is not None
    return _held(scene, "the disk was full", scene.world.disk.full())


def _slow_disk(scene: Scene) -> str:
    assert scene.world.disk is not None
    duty = scene.rng.choice((0.8, 0.95, 1.0))
    return _held(scene, f"writes stood still {duty:.0%} of the time", scene.world.disk.slow(duty))


def _clock(scene: Scene) -> str:
    """A step, and after a while another one back."""
    assert scene.world.clocks is not None
    seconds, whose = scene.rng.choice(STEPS_S), scene.rng.choice(("driver", "second node", "both"))
    driver, node = scene.world.clocks
    with ExitStack() as stack:
        if whose != "second node":
            stack.enter_context(driver.stepped(seconds))
        if whose != "driver":
            stack.enter_context(node.stepped(seconds))
        return _held(scene, f"clock of {whose} off by {seconds:+g} s", nullcontext())


BLOWS: Mapping[Kind, Callable[[Scene], str]] = {
    "worker": _killed("ray::Worker"),
    "raylet": _raylet,
    "checkpoint": _checkpoint,
    "driver": _driver,
    "retriever": _killed(REPLICAS["retriever"]),
    "model": _killed(REPLICAS["model"]),
    "proxy": _killed("ray::ProxyActor"),
    "controller": _killed("ray::ServeController"),
    "web": _web,
    "s3": _s3,
    "cluster": _cluster,
    "stop": _stop,
    "full disk": _full_disk,
    "slow disk": _slow_disk,
    "clock": _clock,
}
