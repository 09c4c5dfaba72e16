import json
from pathlib import Path

import pytest

from ray_app import rundir
from ray_app.errors import RunDirError
from tests.stand_ins import config

FACTS = {"prompt_digest": "abc", "tasks_digest": "def"}


def test_the_same_config_finds_the_same_directory_under_the_home(tmp_path: Path) -> None:
    environ = {"TOOLORCH_HOME": str(tmp_path)}
    first = rundir.locate(config(), FACTS, None, environ)
    assert first == rundir.locate(config(concurrency=3), FACTS, None, environ)
    assert first.parent == tmp_path / "runs"
    assert first != rundir.locate(config(), FACTS | {"tasks_digest": "other"}, None, environ)
    assert first != rundir.locate(config(trials=2), FACTS, None, environ)
    assert rundir.locate(config(run_name="night"), FACTS, None, environ) == tmp_path / "runs" / "night"


@pytest.mark.parametrize("inside", ["runs/x", ".", "tests"])
def test_a_directory_inside_the_package_is_refused(inside: str) -> None:
    with pytest.raises(RunDirError, match="inside the package"):
        rundir.locate(config(), FACTS, rundir.PACKAGE / inside)


@pytest.mark.parametrize("name", ["../up", "a/b", ".."])
def test_a_run_name_never_becomes_a_path(name: str) -> None:
    with pytest.raises(RunDirError, match="plain folder name"):
        rundir.locate(config(run_name=name), FACTS, None)


def test_a_resume_with_another_config_names_the_keys(tmp_path: Path) -> None:
    rundir.open_run(tmp_path / "run", config(), FACTS)
    rundir.open_run(tmp_path / "run", config(concurrency=2, workers=1), FACTS)
    with pytest.raises(RunDirError, match=r"limits\.max_rounds \(50 there, 9 now\)"):
        rundir.open_run(tmp_path / "run", config(limits={"max_rounds": 9}), FACTS)
    with pytest.raises(RunDirError, match="prompt_digest"):
        rundir.check_resumable(tmp_path / "run", config(), FACTS | {"prompt_digest": "other"})
    assert not rundir.check_resumable(tmp_path / "none", config(), FACTS)


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="Not a directory"):
        rundir.open_run(tmp_path / "file" / "run", config(), FACTS)


def test_the_commit_is_found_for_a_copy_without_a_repository(tmp_path: Path) -> None:
    environ, copy = {"TOOLORCH_HOME": str(tmp_path)}, tmp_path / "copy"
    assert rundir.commit({"TOOLORCH_COMMIT": "given"}) == "given"
    note = tmp_path / "commits" / rundir.code_digest()
    note.parent.mkdir()
    note.write_text("noted-commit\n")
    assert rundir.commit(environ, copy) == "noted-commit"
    note.unlink()
    assert rundir.commit(environ, copy) == "unknown"


def test_the_record_names_code_and_versions() -> None:
    record = json.loads(json.dumps(rundir.provenance()))
    assert len(record["code_digest"]) == 32
    assert record["packages"]["ray"] != "not installed"


def test_an_index_that_changed_between_two_starts_is_refused(tmp_path: Path) -> None:
    rundir.open_run(tmp_path / "run", config(), FACTS)
    rundir.confirm(tmp_path / "run", {"retriever_index": "one"})
    rundir.confirm(tmp_path / "run", {"retriever_index": "one"})
    rundir.open_run(tmp_path / "run", config(), FACTS)
    with pytest.raises(RunDirError, match=r"retriever_index \('one' there, 'two' now\)"):
        rundir.confirm(tmp_path / "run", {"retriever_index": "two"})
