"""`python jobs/build_index.py` as a user types it: mistakes, and a build that is killed and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from jobs.build_index import ROOT, app
from ray_app.retrieval.build import MANIFEST, PARTS, VECTORS, build_index, read_manifest
from ray_app.retrieval.corpus import Corpus
from tests.jobs.cluster import finished
from tests.retrieval.data import WordEncoder, rows, write_jsonl
from tests.retrieval.stub_encoders import HERE

DEADLINE_S = 60


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "c.jsonl", rows())


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result) -> str:
    """The one line of a mistake."""
    assert result.exit_code == 2, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_a_corpus_that_cannot_be_read_is_one_line_and_nothing_is_started(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    assert "absent.jsonl' does not exist" in refused(run("--corpus", tmp_path / "absent.jsonl", "--out", out))
    assert not out.exists()
    source.write_text(json.dumps(rows()[0]) + "\n\n{broken\n")
    assert f"{source}:3: not JSON" in refused(run("--corpus", source, "--out", out))
    source.write_text("")
    assert "holds no documents" in refused(run("--corpus", source, "--out", out))
    assert not (out / MANIFEST).exists()


def test_a_folder_that_cannot_be_written_or_holds_something_else_is_named(
    source: Path, tmp_path: Path
) -> None:
    line = refused(run("--corpus", source, "--out", source / "index"))
    assert f"{source}/index: Not a directory; choose a folder that can be written" in line
    build_index(source, WordEncoder(), tmp_path / "index")
    line = refused(run("--corpus", source, "--out", tmp_path / "index"))
    assert "another index (encoder: words there, minilm now); choose another, or replace it with" in line
    assert read_manifest(tmp_path / "index")["encoder"] == "words"


def test_what_is_finished_is_said_to_be_and_no_cluster_is_asked(source: Path, tmp_path: Path) -> None:
    encoder = WordEncoder()
    encoder.name = "minilm"
    build_index(source, encoder, tmp_path / "index")
    result = run("--corpus", source, "--out", tmp_path / "index")
    assert result.exit_code == 0
    assert result.output == f"index: {tmp_path / 'index'} holds this index already; nothing to do\n"


def test_a_submitted_copy_refuses_to_write_where_ray_deletes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0123.zip"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    line = refused(run("--corpus", source, "--out", "index/"))
    assert "inside the copy of the working directory that Ray deletes; give an absolute path" in line
    assert not (tmp_path / "index").exists()


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster of two CPUs."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def start(cluster: str, source: Path, out: Path) -> subprocess.Popen[str]:
    """Shards of eight documents, each of which takes most of a second."""
    command = [sys.executable, "jobs/build_index.py", "--corpus", str(source), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--encoder", f"{HERE}:slow", "--batch", "1"],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": cluster},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def parts(out: Path) -> int:
    return len(list((out / PARTS).glob("*/*.npy")))


def until_parts(job: subprocess.Popen[str], out: Path, count: int) -> None:
    """Returns when so many shards are on disk."""
    deadline = time.monotonic() + DEADLINE_S
    while parts(out) < count:
        assert job.poll() is None and time.monotonic() < deadline, finished(job)
        time.sleep(0.02)


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_build_that_is_killed_and_then_stopped_goes_on_each_time_and_ends_as_one_left_alone(
    cluster: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    killed = start(cluster, source, out)
    until_parts(killed, out, 1)
    killed.kill()
    finished(killed)

    kept = parts(out)
    stopped = start(cluster, source, out)
    until_parts(stopped, out, kept + 1)
    stopped.send_signal(signal.SIGTERM)
    output = finished(stopped)
    assert stopped.returncode == 143, output
    assert f"index: {48 - 8 * kept} of 48 documents to embed" in output
    assert f"{8 * kept} are there from an earlier start" in output
    assert output.endswith("stopped; what is embedded is kept, the same command goes on\n")

    kept = parts(out)
    last = start(cluster, source, out)
    output = finished(last)
    assert last.returncode == 0, output
    assert f"index: {48 - 8 * kept} of 48 documents to embed" in output
    assert "index: 48 of 48 documents embedded, " in output
    assert output.splitlines()[-1].startswith("index: 48 documents, 64 dimensions, ")
    corpus = Corpus.open(out / "corpus.arrow")
    texts = [corpus.text(row) for row in range(len(corpus))]
    assert np.array_equal(np.load(out / VECTORS), WordEncoder().encode_documents(texts))
