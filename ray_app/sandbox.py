"""Runs model-written Python as an untrusted program, and returns what it printed.

Each program gets its own process tree, killed whole at the end, and the strongest isolation that the
machine gives (`available_isolation`), found out once:

- namespaces (Linux 5.12 or later): own user, PID, mount, network, IPC and UTS namespaces. The program
  sees the interpreter, the system libraries and site-packages read-only, one size-limited directory,
  its own processes and no network. Root runs it under a uid of its own, without capabilities.
- "uid" (root where namespaces are forbidden): a uid and a 0700 directory of its own. The network and
  world-readable files stay within reach.
- "rlimits" alone (another user where namespaces are forbidden): the program has the user's rights.

Refused: a weaker layer than asked for, and root without a uid or user namespace of the program's own.
Not covered: bugs of the kernel, whose whole system-call surface stays open, and memory that no address
space holds (unmapped memfd files, detached SysV segments): that takes a cgroup.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import marshal
import os
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_app.errors import SandboxError
from ray_app.records import ExecutionResult

NAMESPACES = ("user", "pid", "mount", "network", "ipc", "uts", "rlimits")
FLOOD_FACTOR = 16
GRACE_S = 15.0
SYSTEM_PATHS = (
    "/bin",
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/bin",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/local/bin",
    "/usr/local/lib",
    "/usr/share/zoneinfo",
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/etc/localtime",
)


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """What one program may use.

    `memory_bytes` holds for each process's address space and, with a PID namespace, for the memory of
    all of them together. `output_bytes` is what is kept of each stream: its beginning and its end; a
    program that prints 16 times as much is stopped. `file_bytes` is the size of the largest file and,
    with a mount namespace, of the writable directory.
    """

    wall_s: float = 60.0
    cpu_s: float = 60.0
    memory_bytes: int = 2 << 30
    output_bytes: int = 64 << 10
    processes: int = 32
    file_bytes: int = 64 << 20


async def run_python(
    code: str, limits: SandboxLimits = SandboxLimits(), layers: tuple[str, ...] | None = None
) -> ExecutionResult:
    """Run `code` as a program of its own and wait for its end; cancelling kills it.

    `layers` is one of `candidate_layers()`, by default the strongest that works here. `exit_status` is
    the program's, or -n for signal n (-9 when a limit stopped it, -24 for CPU time); `is_timed_out` is
    set for the wall time only. Undecodable output bytes are replaced. Raises SandboxError when the
    sandbox could not run the program, never for what the program does.
    """
    if layers is None:
        layers = await asyncio.to_thread(available_isolation)
    job = _job(code, limits, layers)
    started = time.monotonic()
    run = await _Run.start(limits)
    report = await run.finish(job)
    return ExecutionResult(
        stdout=run.stdout.text(),
        stderr=run.stderr.text(),
        exit_status=report.exit_status,
        is_timed_out=report.is_timed_out,
        duration_s=time.monotonic() - started,
        isolation=layers,
    )


@functools.cache
def available_isolation() -> tuple[str, ...]:
    """The strongest layers that hold on this machine, tried out once per process with a real program.

    Raises SandboxError when none works.
    """
    # A thread of its own, so that the call also works where an event loop is running.
    with ThreadPoolExecutor(1) as pool:
        for layers in candidate_layers():
            try:
                result = pool.submit(asyncio.run, run_python("print(6 * 7)", layers=layers)).result()
            except SandboxError as error:
                logging.getLogger(__name__).warning("sandbox without %s: %s", ", ".join(layers), error)
                failure = error
                continue
            if result.stdout == "42\n":
                return layers
            failure = SandboxError(f"a trial program in the sandbox printed {result!r}")
    raise failure


def candidate_layers() -> tuple[tuple[str, ...], ...]:
    """The sets of layers that this user can ask for, strongest first."""
    if os.geteuid() == 0:
        return ("uid", *NAMESPACES), ("uid", *NAMESPACES[1:]), ("uid", "rlimits")
    return NAMESPACES, ("rlimits",)


@dataclass(frozen=True, slots=True)
class _Report:
    exit_status: int
    is_timed_out: bool


class _Capture:
    """Keeps the first and the last half of `limit` bytes of a stream, however long it is."""

    def __init__(self, limit: int) -> None:
        self._half = max(1, limit // 2)
        self._head = bytearray()
        self._tail = bytearray()
        self.total_bytes = 0

    def feed(self, chunk: bytes) -> None:
        self.total_bytes += len(chunk)
        room = self._half - len(self._head)
        self._head += chunk[:room]
        self._tail += chunk[room:]
        del self._tail[: -self._half]

    def text(self) -> str:
        left_out = self.total_bytes - len(self._head) - len(self._tail)
        note = f"\n[... {left_out} bytes left out ...]\n".encode() if left_out else b""
        return (self._head + note + self._tail).decode("utf-8", "replace")


class _Run:
    """One launcher process with its pipes."""

    def __init__(self, process: Process, report_fd: int, limits: SandboxLimits) -> None:
        self._process = process
        self._report_fd = report_fd
        self._limits = limits
        self.stdout = _Capture(limits.output_bytes)
        self.stderr = _Capture(limits.output_bytes)

    @classmethod
    async def start(cls, limits: SandboxLimits) -> _Run:
        read_fd, write_fd = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *_launcher(write_fd),
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env={},
                cwd="/",
                pass_fds=(write_fd,),
                start_new_session=True,
            )
        except BaseException as error:
            os.close(read_fd)
            if isinstance(error, OSError):
                raise SandboxError(f"cannot start the sandbox launcher: {error}") from error
            raise
        finally:
            os.close(write_fd)
        return cls(process, read_fd, limits)

    async def finish(self, job: bytes) -> _Report:
        """Send the job, read the streams to their end and return how the program ended."""
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._process.stdin.write(job)
        everything = asyncio.gather(
            self._read(self._process.stdout, self.stdout),
            self._read(self._process.stderr, self.stderr),
            self._process.wait(),
        )
        try:
            # The launcher keeps the wall time; the grace is for a launcher that hangs.
            await asyncio.wait([everything], timeout=self._limits.wall_s + GRACE_S)
        finally:
            await self._stop(everything)
            report = self._read_report()
        return self._parse(report)

    async def _read(self, stream: asyncio.StreamReader, capture: _Capture) -> None:
        while chunk := await stream.read(1 << 16):
            capture.feed(chunk)
            if capture.total_bytes > FLOOD_FACTOR * self._limits.output_bytes:
                self._order_stop()

    def _order_stop(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()

    async def _stop(self, everything: asyncio.Future[tuple[None, None, int]]) -> None:
        self._order_stop()
        try:
            # asyncio reports the end of a process only past its output, so the streams are read on.
            await asyncio.wait([everything], timeout=GRACE_S)
        finally:
            if self._process.returncode is None:
                self._process.kill()

    def _read_report(self) -> str:
        os.set_blocking(self._report_fd, False)
        with os.fdopen(self._report_fd, "rb") as report:
            return (report.read() or b"").decode()

    def _parse(self, report: str) -> _Report:
        lines = dict(line.split(" ", 1) for line in report.splitlines())
        if "error" in lines:
            raise SandboxError(f"the sandbox could not run the program: {lines['error']}")
        if self._process.returncode != 0:
            said = self.stderr.text().strip()[-500:]
            raise SandboxError(f"the sandbox launcher ended with status {self._process.returncode}: {said}")
        return _Report(int(lines.get("exit", -9)), "timeout" in lines)


def _launcher(report_fd: int) -> tuple[str, ...]:
    # Imported rather than run as a script, so that its compiled form is kept.
    here = str(Path(__file__).resolve().parent)
    start = f"import sys; sys.path.append({here!r}); import sandbox_child; sandbox_child.main({report_fd})"
    return (_interpreter(), "-I", "-S", "-c", start)


def _job(code: str, limits: SandboxLimits, layers: tuple[str, ...]) -> bytes:
    if layers not in candidate_layers():
        raise SandboxError(f"isolation {layers} is not offered here: use one of {candidate_layers()}")
    fields = asdict(limits)
    del fields["output_bytes"]
    job = {
        "code": code,
        "layers": layers,
        "python": _interpreter(),
        "scratch": tempfile.gettempdir(),
        **_view(),
        **fields,
    }
    return marshal.dumps(job)


def _interpreter() -> str:
    """The interpreter that a virtual environment stands on: the launcher needs no installed package."""
    return str(
        Path(sys.base_prefix).resolve() / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    )


@functools.cache
def _view() -> dict[str, object]:
    """What a program may see of this machine: (real path, path inside) pairs, and the package folders."""
    packages = tuple(path for path in sys.path if _is_package_folder(Path(path)))
    prefix = Path(sys.base_prefix).resolve()
    wanted = {*SYSTEM_PATHS, *packages, *(str(prefix / name) for name in ("bin", "lib", "lib64"))}
    inside: list[str] = []
    for path in sorted(path for path in wanted if Path(path).exists()):
        if not any(path.startswith(f"{parent}/") for parent in inside):
            inside.append(path)
    here = str(Path(__file__).resolve().parent)
    return {
        "visible": tuple((str(Path(path).resolve()), path) for path in inside),
        # An installed copy of this package carries questions with their answers.
        "hidden": here if any(here.startswith(f"{path}/") for path in inside) else "",
        "packages": packages,
    }


def _is_package_folder(path: Path) -> bool:
    return path.is_absolute() and path.name in ("site-packages", "dist-packages") and path.is_dir()
