"""What the driver does around a run."""

from __future__ import annotations

import pytest

from ray_app import driver
from ray_app.errors import StorageError


def test_storage_that_fails_at_the_end_is_waited_for_and_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "STORAGE_RETRY_S", 0.001)
    failures = [StorageError("the disk is full"), StorageError("the disk is full"), OSError("no such mount")]

    def work() -> str:
        if failures:
            raise failures.pop(0)
        return "written"

    assert driver.patiently(work) == "written"
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "warning: the disk is full; tried again for up to 120 s",
        "warning: no such mount; tried again for up to 120 s",
    ]
    failures.append(StorageError("gone"))
    with pytest.raises(StorageError, match="gone"):
        driver.patiently(work, patience_s=-1.0)
    assert capsys.readouterr().err == ""
