"""Runs on an object store: `s3://bucket/prefix`, and the local mirror that everything reads from.

The bucket is the truth. A *mirror* is a folder below the home that holds the marker `remote.json` and
copies of the run's objects, so that every reader works on local files. Below the prefix:

    log/<epoch>/<writer>/<seq>.arrows      one flush, immutable; flat in the mirror: <epoch>-<writer>-<seq>
    payloads/...                           the same for the other table
    log/compacted-<name>.parquet           a compacted table
    manifests/<name>.json                  which objects a compacted one replaces
    lease/, status/, analysis/, logs/, *.yaml, *.json    small files that may change

Compaction puts the Parquet object, then its manifest, and only then deletes what it replaces; readers drop
doubles by key. `refresh` relies on that order, and on listings that show what was put before (as S3's do).
A file that changes is the bucket's: who writes one into the mirror pushes it before the next refresh.
Not covered: versions of changing files may be seen out of order by processes that refresh at one moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from ray_app import rundir
from ray_app.errors import ConfigError, RunDirError, StorageError

TABLES = ("log", "payloads")
MARKER = "remote.json"
# Callers try again themselves, so that a driver can wait out a store that is away.
TIMEOUT_S, ATTEMPTS = 10.0, 3
_TRANSFERS = 8
_RELISTS = 20  # a listing is outdated once per compaction that ends during it
_CONFLICTS = 3
_ONE_PUT_BYTES = 8 << 20  # above, in parts: one put takes 5 GB at most, and is slower
_LEFT_BEHIND_S = 3600.0
INCOMING = ".incoming"
_CHANGING = ("lease", "status", "analysis", "logs")

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_PART = re.compile(rf"({'|'.join(TABLES)})/(\d+)/({_NAME})/(\d+)\.arrows")
_LOCAL_PART = re.compile(rf"({'|'.join(TABLES)})/(\d+)-({_NAME})-(\d+)\.arrows")
_COMPACTED = re.compile(rf"({'|'.join(TABLES)})/compacted-{_NAME}\.parquet")
_MANIFEST = re.compile(rf"manifests/{_NAME}\.json")
_SMALL = re.compile(rf"{_NAME}\.(json|yaml)|({'|'.join(_CHANGING)})(/{_NAME})+")
_REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "401", "403"}
_MISSING = {"NoSuchKey", "404"}
_Answer = Literal["written", "refused", "conflict", "unsupported"]
_CONDITION_ANSWERS: dict[str, _Answer] = {
    **dict.fromkeys(("PreconditionFailed", "412"), "refused"),
    **dict.fromkeys(("ConditionalRequestConflict", "409"), "conflict"),
    **dict.fromkeys(("NotImplemented", "501", "InvalidArgument", "InvalidRequest", "400"), "unsupported"),
}


class Gone(StorageError):
    """The object is not there, or not any more."""


class Stored(NamedTuple):
    """One object as a listing shows it; `modified` is Unix seconds of the store's clock, whole seconds."""

    size: int
    modified: float
    etag: str


class ObjectStore:
    """The objects below one url, named relative to it. Thread-safe; pickles as its url.

    Endpoint and credentials are boto3's usual ones (AWS_ENDPOINT_URL, AWS_PROFILE, ...). Every failure of
    the store is a StorageError of one line. Raises RunDirError for a url without bucket.
    """

    def __init__(self, url: str) -> None:
        self.url = canonical(url)
        parts = urlsplit(self.url)
        self.bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._lock = threading.RLock()
        self._is_conditional: bool | None = None

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str]]:
        return ObjectStore, (self.url,)

    def put(self, name: str, data: bytes) -> None:
        """Write an object, over one that is there."""
        self._call("put_object", name, Body=data)

    def put_new(self, name: str, data: bytes) -> bool:
        """Create an object; False where one is there. `data` must be unlike what anybody else would write.

        Of several at one moment exactly one gets True, if `has_conditional_put`; else that is likely only.
        """
        if self.has_conditional_put:
            if self._put_conditional(name, data):
                return True
        elif self._read(name) is None:
            self.put(name, data)
        # Asked of the store: an own attempt whose answer was lost looks like somebody else's.
        return self._read(name) == data

    @property
    def has_conditional_put(self) -> bool:
        """Whether the store refuses a conditional put over an object that is there: tried once."""
        with self._lock:
            if self._is_conditional is None:
                self._is_conditional = self._probe()
            return self._is_conditional

    def get(self, name: str) -> bytes:
        """The bytes of an object. Raises Gone."""
        answer = self._call("get_object", name)
        with self._errors():
            data: bytes = answer["Body"].read()
        return data

    def download(self, name: str, path: Path) -> Stored:
        """Write an object to the file `path`, which gets the object's time. Raises Gone."""
        answer = self._call("get_object", name)
        with path.open("wb") as file, self._errors():
            for chunk in answer["Body"].iter_chunks(1 << 20):
                file.write(chunk)
        modified = answer["LastModified"].timestamp()
        os.utime(path, (modified, modified))
        return Stored(path.stat().st_size, modified, answer["ETag"].strip('"'))

    def upload(self, name: str, path: Path) -> None:
        """Write the file `path`, of any size, as an object."""
        if path.stat().st_size < _ONE_PUT_BYTES:
            self.put(name, path.read_bytes())
        else:
            with self._errors() as client:
                client.upload_file(str(path), self.bucket, self._key(name))

    def list(self, prefix: str = "") -> dict[str, Stored]:
        """Every object whose name begins with `prefix`, in order of name."""
        found: dict[str, Stored] = {}
        start = len(self._key(""))
        with self._errors() as client:
            pages = client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._key(prefix)):
                for item in page.get("Contents", ()):
                    modified = item["LastModified"].timestamp()
                    found[item["Key"][start:]] = Stored(item["Size"], modified, item["ETag"].strip('"'))
        return found

    def age_s(self, name: str) -> float:
        """Seconds since the object was written, by the store's own clock, to a second. Raises Gone."""
        answer = self._call("head_object", name)
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        age: float = now.timestamp() - answer["LastModified"].timestamp()
        return age

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; one that is not there is no error."""
        keys = [{"Key": self._key(name)} for name in names]
        for start in range(0, len(keys), 1000):
            batch = {"Objects": keys[start : start + 1000], "Quiet": True}
            with self._errors() as client:
                answer = client.delete_objects(Bucket=self.bucket, Delete=batch)
            if failed := answer.get("Errors"):
                raise StorageError(f"{self.url}: cannot delete {failed[0]['Key']}: {failed[0]['Code']}")

    def _put_conditional(self, name: str, data: bytes) -> bool:
        """Whether a put that an object which is there refuses wrote."""
        answer: _Answer = "conflict"
        for _ in range(_CONFLICTS):
            if answer == "conflict":
                answer = self._try_condition(name, data)
        return answer == "written"

    def _try_condition(self, name: str, data: bytes) -> _Answer:
        """One conditional put; a conflict is another put to the same name at the same moment."""
        from botocore.exceptions import ClientError

        with self._errors() as client:
            try:
                client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, IfNoneMatch="*")
            except ClientError as error:
                answer = _CONDITION_ANSWERS.get(str(error.response["Error"].get("Code", "")))
                if answer is None:
                    raise
                return answer
        return "written"

    def _probe(self) -> bool:
        """Puts an object twice: a store may also take the condition and pay it no heed."""
        name = f"probe-{uuid.uuid4().hex}"
        answers = [self._try_condition(name, b"first"), self._try_condition(name, b"second")]
        self.delete([name])
        return answers == ["written", "refused"]

    def _read(self, name: str) -> bytes | None:
        try:
            return self.get(name)
        except Gone:
            return None

    def _call(self, operation: str, name: str, **arguments: Any) -> Any:
        with self._errors(name) as client:
            return getattr(client, operation)(Bucket=self.bucket, Key=self._key(name), **arguments)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @cached_property
    def _client(self) -> Any:
        try:
            import boto3  # optional: only runs on an object store need it
            from botocore.config import Config
        except ImportError:
            raise ConfigError(f"{self.url} needs boto3: install toolorch-eval[s3]") from None
        config = Config(
            connect_timeout=TIMEOUT_S,
            read_timeout=TIMEOUT_S,
            retries={"mode": "standard", "max_attempts": ATTEMPTS},
            max_pool_connections=2 * _TRANSFERS,
        )
        with self._lock:  # making a client is the one thing of boto3 that is not thread-safe
            try:
                return boto3.session.Session().client("s3", config=config)
            except _boto_errors() as error:
                raise _translated(self.url, "", error) from None
            except ValueError as error:  # an endpoint that is no url
                raise StorageError(f"{self.url}: {error}; mend AWS_ENDPOINT_URL") from None

    @contextmanager
    def _errors(self, name: str = "") -> Iterator[Any]:
        """The client, whose failures rise as one line that says what to do."""
        client = self._client  # first: it says so where boto3 is missing
        try:
            yield client
        except _boto_errors() as error:
            raise _translated(self.url, name, error) from None


def _boto_errors() -> tuple[type[Exception], ...]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return Boto3Error, BotoCoreError, ClientError, ResponseParserError


def _translated(url: str, name: str, error: Exception) -> StorageError:
    """What a failure of boto3 means to the user of a run."""
    from botocore import exceptions as boto

    words = " ".join(str(error).split())
    if isinstance(error, boto.ClientError):
        return _refused(url, name, error.response, words)
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound)):
        remedy = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return StorageError(f"{url}: no credentials ({words}); {remedy}")
    if isinstance(error, (boto.HTTPClientError, boto.ConnectionError)):
        return StorageError(
            f"{url}: the object store does not answer ({words}); check AWS_ENDPOINT_URL and the network"
        )
    return StorageError(f"{url}: {words}; check the url and the AWS settings")


def _refused(url: str, name: str, response: Mapping[str, Any], words: str) -> StorageError:
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket" or (code in _MISSING and not name):
        return StorageError(f"{url}: the bucket does not exist; create it or mend the url")
    if code in _MISSING:
        return Gone(f"{url}: no object {name}; it was deleted, or never written")
    if code in _REFUSED:
        remedy = "check the credentials and their rights to list, get, put and delete there"
        return StorageError(f"{url}: the object store refused access ({code}); {remedy}")
    if status >= 500 or code in {"SlowDown", "RequestTimeout"}:
        return StorageError(f"{url}: the object store answers {status} ({code}); run again later")
    return StorageError(f"{url}: {words}; check the url and the AWS settings")


def is_url(run: str | Path) -> bool:
    """Whether `run` names an object store; a Path has lost one of the two slashes."""
    return re.match(r"s3:(/|$)", str(run)) is not None


def canonical(url: str | Path) -> str:
    """`s3://bucket/prefix` in its one spelling. Raises RunDirError where it names no bucket."""
    bucket, *path = [part for part in re.sub(r"^s3:/+", "", str(url)).split("/") if part] or [""]
    if not is_url(url) or bucket in {"", "s3:"} or re.match(r"s3:///", str(url)):
        raise RunDirError(f"run {url}: expected s3://BUCKET/PREFIX")
    if {".", ".."} & set(path):
        raise RunDirError(f"run {url}: expected a prefix without . and ..")
    return "/".join([f"s3://{bucket}", *path])


def attach(url: str | Path) -> Path:
    """The mirror of the run at `url` on this machine, made where there is none; empty until a refresh."""
    name = canonical(url)
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", name.rpartition("/")[2])[:40]
    mirror = rundir.home() / "mirrors" / f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    if not (mirror / MARKER).exists():
        try:
            for folder in (INCOMING, *TABLES):
                (mirror / folder).mkdir(parents=True, exist_ok=True)
            temporary = _temporary(mirror)
            temporary.write_text(json.dumps({"url": name}) + "\n")
            temporary.replace(mirror / MARKER)
        except OSError as error:
            raise rundir.unusable(mirror, error) from None
    return mirror


def local(run: str | Path) -> Path:
    """The folder to read a run from: that of an url is its mirror, as fresh as the bucket."""
    if not is_url(run):
        return Path(run)
    mirror = attach(run)
    refresh(mirror)
    return mirror


_stores: dict[str, ObjectStore] = {}


def place(run_dir: Path) -> str:
    """Where the run is, as its user may type it: the url behind a mirror, or the folder itself."""
    store = store_of(run_dir)
    return str(run_dir) if store is None else store.url


def store_of(run_dir: Path) -> ObjectStore | None:
    """The store behind a mirror; None for a plain run directory. Raises StorageError for a torn marker."""
    key = str(run_dir)
    if key not in _stores:
        marker = Path(run_dir) / MARKER
        if not marker.is_file():
            return None
        try:
            _stores[key] = ObjectStore(json.loads(marker.read_text())["url"])
        except (OSError, ValueError, KeyError, TypeError):
            raise StorageError(f"{marker} does not read; delete the folder, it is only a copy") from None
    return _stores[key]


def flush_name(table: str, epoch: int, writer: str, seq: int) -> str:
    """The object of one flush: flushes of a writer count from 0."""
    return f"{table}/{epoch:06d}/{writer}/{seq:08d}.arrows"


def local_name(name: str) -> str:
    """Where the object `name` lies in the mirror, relative to it."""
    part = _PART.fullmatch(name)
    return f"{part[1]}/{part[2]}-{part[3]}-{part[4]}.arrows" if part else name


def object_name(path: str) -> str:
    """The object of which the mirror's file `path` (relative to it) is the copy."""
    part = _LOCAL_PART.fullmatch(path)
    return f"{part[1]}/{part[2]}/{part[3]}/{part[4]}.arrows" if part else path


def push(run_dir: Path, names: Iterable[str]) -> None:
    """Upload files and folders of the mirror by relative name; a name that is not there is left out.

    Nothing happens to a plain run directory, which is itself the truth.
    """
    store = store_of(run_dir)
    if store is None:
        return
    for name in names:
        root = Path(run_dir) / name
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            relative = path.relative_to(run_dir).as_posix()
            if path.is_file() and path.suffix != ".tmp" and _SMALL.fullmatch(relative):
                store.upload(relative, path)


def publish_compacted(run_dir: Path, parquet: Path, name: str, replaces: Collection[str]) -> None:
    """Put the file `parquet` in the place of the objects `replaces`, as `<table>/compacted-<x>.parquet`.

    `name` must never have been used. After a crash in between readers see doubles at most; run again.
    """
    store = store_of(run_dir)
    if store is None or not _COMPACTED.fullmatch(name):
        raise ValueError(f"{run_dir}, {name}: expected a mirror and TABLE/compacted-NAME.parquet")
    table, _, file = name.partition("/")
    store.upload(name, parquet)
    manifest = {"table": table, "output": name, "replaces": sorted(replaces)}
    store.put(f"manifests/{table}-{Path(file).stem}.json", json.dumps(manifest).encode())
    sweep(run_dir)


def sweep(run_dir: Path) -> None:
    """Delete the objects that a manifest replaces: what a compaction that was cut short left."""
    store = store_of(run_dir)
    if store is not None:
        mirror = _Mirror(Path(run_dir), store)
        listed = {name for table in TABLES for name in store.list(f"{table}/")}
        store.delete(sorted(listed & set(mirror.manifests())))


def refresh(run_dir: Path, prefixes: Collection[str] | None = None) -> None:
    """Bring the mirror up to the bucket; nothing happens to a plain run directory.

    `prefixes` limits what is looked at to folders ("log", "status") and files ("config.yaml"). Threads and
    processes may refresh one mirror together. Raises StorageError; what was local before stays readable.
    """
    store = store_of(run_dir)
    if store is None:
        return
    try:
        _Mirror(Path(run_dir), store).refresh(prefixes)
    except OSError as error:
        raise StorageError(f"mirror {run_dir}: {error.strerror or error}; free space there") from None


class _Mirror:
    """One refresh of a mirror."""

    def __init__(self, folder: Path, store: ObjectStore) -> None:
        self._folder, self._store = folder, store

    def refresh(self, prefixes: Collection[str] | None) -> None:
        (self._folder / INCOMING).mkdir(exist_ok=True)
        self._clean()
        for _ in range(_RELISTS):
            if self._round(prefixes):
                return
        raise StorageError(f"{self._store.url}: objects vanish faster than they are read; run again")

    def manifests(self) -> dict[str, str]:
        """For each object that was replaced, the object that replaced it; manifests are copied on the way."""
        listed = {n: s for n, s in self._store.list("manifests/").items() if _MANIFEST.fullmatch(n)}
        self._fetch({name: stored for name, stored in listed.items() if not self._is_same(name, stored)})
        replaced: dict[str, str] = {}
        for name in listed:
            manifest = json.loads((self._folder / name).read_text())
            replaced |= dict.fromkeys(manifest["replaces"], manifest["output"])
        return replaced

    def _round(self, prefixes: Collection[str] | None) -> bool:
        """One listing and what follows from it; False where the listing was outdated meanwhile."""
        listed = self._listed(prefixes)
        tables = [table for table in TABLES if prefixes is None or table in prefixes]
        # After the tables: an object that a compaction deleted before it could be listed has its manifest.
        replaced = self.manifests() if tables else {}
        for output in set(replaced.values()) - set(replaced):
            if output.partition("/")[0] in tables and output not in listed:
                return False
        parts = {n: s for n, s in listed.items() if _is_table(n) and n not in replaced}
        changing = {n: s for n, s in listed.items() if _SMALL.fullmatch(n) and n != MARKER}
        wanted = {n: s for n, s in parts.items() if not self._is_same(n, s)}
        wanted |= {n: s for n, s in changing.items() if not self._is_current(n, s)}
        for table in tables:
            (self._folder / table).mkdir(exist_ok=True)
        if not self._fetch(wanted):
            return False
        for table in tables:
            self._forget(table, parts, replaced)
        if prefixes is None and not listed:
            self._forget_run()
        return True

    def _listed(self, prefixes: Collection[str] | None) -> dict[str, Stored]:
        if prefixes is None:
            return self._store.list()
        found: dict[str, Stored] = {}
        for prefix in prefixes:
            is_file = _SMALL.fullmatch(prefix) is not None
            found |= self._store.list(prefix if is_file else prefix.rstrip("/") + "/")
        return found

    def _fetch(self, wanted: Mapping[str, Stored]) -> bool:
        """Copy objects into place, several at once; False where one has vanished meanwhile."""
        if len(wanted) <= 1:
            return all(map(self._copy, wanted))
        with ThreadPoolExecutor(min(_TRANSFERS, len(wanted))) as pool:
            return all(list(pool.map(self._copy, wanted)))

    def _copy(self, name: str) -> bool:
        target, temporary = self._folder / local_name(name), _temporary(self._folder)
        try:
            self._store.download(name, temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(target)
        except (Gone, FileNotFoundError):  # or taken for a remnant by a process whose clock was set
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _forget(self, table: str, parts: Mapping[str, Stored], replaced: Mapping[str, str]) -> None:
        """Delete copies of what the bucket does not have: what replaces them has its copy by now."""
        for path in list((self._folder / table).iterdir()):
            name = object_name(f"{table}/{path.name}")
            if name in parts or not _is_table(name):
                continue
            # Another process may have copied what was put after this listing: the store itself is asked.
            if name in replaced or name not in self._store.list(name):
                path.unlink(missing_ok=True)

    def _forget_run(self) -> None:
        """Nothing of this run is in the bucket any more: a copy left here would pass for a later run's."""
        for path in [
            *self._folder.glob("*"),
            *(p for top in _CHANGING for p in self._folder.glob(f"{top}/**/*")),
        ]:
            if path.is_file() and path.name != MARKER:
                path.unlink(missing_ok=True)

    def _is_same(self, name: str, stored: Stored) -> bool:
        """Whether the copy of an immutable object is there; another time: another object of that name."""
        try:
            stat = (self._folder / local_name(name)).stat()
        except FileNotFoundError:
            return False
        return (stat.st_size, int(stat.st_mtime)) == (stored.size, int(stored.modified))

    def _is_current(self, name: str, stored: Stored) -> bool:
        """Whether the copy of a file that may change holds what the store holds; brings its time along."""
        path = self._folder / name
        try:
            if path.stat().st_size != stored.size:
                return False
            # Times are whole seconds, so the content decides where the store tells its digest.
            if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == stored.etag:
                os.utime(path, (stored.modified, stored.modified))
                return True
        except FileNotFoundError:
            return False
        is_digest = re.fullmatch(r"[0-9a-f]{32}", stored.etag) is not None
        return not is_digest and self._is_same(name, stored)

    def _clean(self) -> None:
        """Delete what downloads of killed processes left."""
        for path in (self._folder / INCOMING).iterdir():
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _LEFT_BEHIND_S:
                    path.unlink()


def _is_table(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_PART, _COMPACTED))


def _temporary(mirror: Path) -> Path:
    return mirror / INCOMING / uuid.uuid4().hex
