import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_app import lease
from ray_app.errors import RunDirError, StorageError


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    held = lease.take(tmp_path)
    with pytest.raises(RunDirError, match=f"process {os.getpid()} on .* is running it"):
        lease.take(tmp_path)
    held.release()
    assert lease.take(tmp_path).epoch == held.epoch + 1


def test_a_killed_driver_is_replaced_at_once(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from ray_app import lease; "
        f"lease.take(Path({str(tmp_path)!r})); print('held', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RunDirError, match=f"process {other.pid}"):
            lease.take(tmp_path)
        other.kill()
        other.wait()
    assert lease.take(tmp_path).epoch == 2


def test_a_driver_that_was_replaced_may_not_commit(tmp_path: Path) -> None:
    old = lease.take(tmp_path)
    old.check()
    (old.path.parent / f"epoch-{old.epoch + 1:06d}.json").write_text("{}")
    with pytest.raises(StorageError, match="replaced by epoch 2"):
        old.check()


@pytest.mark.parametrize(("age_s", "is_free"), [(0, False), (lease.LEASE_S + 5, True)])
def test_a_driver_on_another_machine_lives_by_its_heartbeat(
    tmp_path: Path, age_s: float, is_free: bool
) -> None:
    folder = tmp_path / "lease"
    folder.mkdir()
    path = folder / "epoch-000001.json"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 1.0}))
    os.utime(path, (time.time() - age_s,) * 2)
    if is_free:
        assert lease.take(tmp_path).epoch == 2
    else:
        with pytest.raises(RunDirError, match="on elsewhere"):
            lease.take(tmp_path)
