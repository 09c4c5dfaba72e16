"""The logs of replicas that failed, from whichever node they ran on. Through Ray's own state API."""

from __future__ import annotations

import logging

from ray.util.state import get_log, list_actors

TAIL_LINES = 2000
MAX_REPLICAS = 2

_log = logging.getLogger(__name__)


def replica_logs(application: str, deployment: str) -> list[str]:
    """What the newest dead replicas of a deployment wrote; empty where nobody can be asked."""
    try:
        dead = list_actors(
            filters=[("class_name", "=", f"ServeReplica:{application}:{deployment}"), ("state", "=", "DEAD")],
            detail=True,
        )
        newest = sorted(dead, key=lambda actor: actor.start_time_ms or 0, reverse=True)[:MAX_REPLICAS]
        return [_written(actor.actor_id, suffix) for actor in newest for suffix in ("err", "out")]
    except Exception as error:  # it only explains another failure, and must not hide it
        _log.debug("no logs of %s: %s", deployment, error)
        return []


def _written(actor_id: str, suffix: str) -> str:
    return "".join(get_log(actor_id=actor_id, suffix=suffix, tail=TAIL_LINES))
