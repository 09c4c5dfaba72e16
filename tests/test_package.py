"""What `ray job submit --working-dir .` uploads: the code, and none of the data."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import yaml

from ray_app.rundir import PACKAGE

DATA = [
    "hle.jsonl",
    "data/hle.parquet",
    "runs/night/log/part.parquet",
    "log/stream.arrows",
    "index/eval.index",
    "index/vectors.npy",
    "index/corpus.arrow",
    "examples.json",
    ".venv/lib/module.py",
]
CODE = [
    "ray_app/sample/questions.jsonl",
    "jobs/hle.py",
    "serve_config.yaml",
    "ray_app/prompts/search.txt",
    "ray_app/tau2/service_desk/tasks.json",
    "ray_app/tau2/service_desk/policy.md",
]


def test_an_upload_holds_the_code_and_no_data(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    for name in CODE + DATA:
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text("x")
    shutil.copy(PACKAGE / ".gitignore", tmp_path / "project")
    create_package(
        str(tmp_path / "project"), tmp_path / "upload.zip", include_gitignore=True, excludes=[".venv"]
    )
    uploaded = {
        name for name in zipfile.ZipFile(tmp_path / "upload.zip").namelist() if not name.endswith("/")
    }
    assert uploaded - {".gitignore"} == set(CODE)


def test_the_cluster_launcher_config_is_valid() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((PACKAGE / "cluster.yaml").read_text())))
