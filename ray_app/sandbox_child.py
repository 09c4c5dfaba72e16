"""The launcher between the evaluation and a sandboxed program: one short process per program.

`sandbox.py` starts it with an empty environment, sends one marshalled `Job` on stdin and keeps stdin
open: end of file is the order to stop, so a caller that dies stops its program too. It writes
`error <text>`, `timeout yes` or `exit <status>` to the report descriptor and nothing to stdout or stderr,
which belong to the program.

With namespaces: launcher -> init (PID 1 of the namespace, builds the root, drops every privilege)
-> program; when init ends, the kernel kills whatever is left. Without: launcher -> program, in a
temporary directory that the launcher removes. It refuses to weaken a requested layer: a step that
fails is an error. Only light modules are imported, because each program pays for them.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import shutil
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

BOX = "/sandbox"
OLD_ROOT = "/.old"
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
SYSTEM_PYTHONS = ("/usr/local/bin/python3", "/usr/bin/python3")
MEMORY_POLL_MS = 250

NEW_NS, NEW_UTS, NEW_IPC = 0x20000, 0x4000000, 0x8000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH, AT_RECURSIVE, AT_FDCWD = 2, 0x8000, -100
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38

libc = ctypes.CDLL(None, use_errno=True)


class Job:
    """What to run, in which layers, with which limits. Plain values, so that marshal carries it."""

    def __init__(
        self,
        *,
        code: str,
        layers: tuple[str, ...],
        python: str,
        visible: tuple[tuple[str, str], ...],
        hidden: str,
        packages: tuple[str, ...],
        scratch: str,
        wall_s: float,
        cpu_s: float,
        memory_bytes: int,
        processes: int,
        file_bytes: int,
    ) -> None:
        self.code, self.layers, self.python = code, layers, python
        self.visible, self.hidden, self.packages, self.scratch = visible, hidden, packages, scratch
        self.wall_s, self.cpu_s, self.memory_bytes = wall_s, cpu_s, memory_bytes
        self.processes, self.file_bytes = processes, file_bytes


class Report:
    """The one way back to the caller; closed on exec, so the program never holds it."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self.fd = fd

    def send(self, line: str) -> None:
        try:
            os.write(self.fd, (line.replace("\n", " ")[:2000] + "\n").encode())
        except BrokenPipeError:
            return  # the caller is dead, and clearing up must go on


def main(report_fd: int) -> None:
    """Run the job on stdin to its end; returns when nothing of it is left."""
    report = Report(report_fd)
    os.umask(0o022)
    try:
        # When the machine runs out of memory, the program goes before the evaluation does.
        _write("/proc/self/oom_score_adj", "1000")
        job = Job(**marshal.load(sys.stdin.buffer))
        (_run_in_namespaces if "pid" in job.layers else _run_in_directory)(job, report)
    except Exception as error:
        report.send(f"error {error}")


def _run_in_namespaces(job: Job, report: Report) -> None:
    uid = _unused_uid() if "uid" in job.layers else os.getuid()
    if "uid" not in job.layers:
        _enter_user_namespace()
    _check(libc.unshare(NEW_PID), "unshare the PID namespace")
    init = _fork(lambda: _init(job, report, uid), report)
    _wait(init, job, report)
    os.kill(init, signal.SIGKILL)
    os.waitpid(init, 0)


def _run_in_directory(job: Job, report: Report) -> None:
    # Orphans of the program come to this process instead of the machine's init, so none gets away.
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    uid = _unused_uid() if "uid" in job.layers else os.getuid()
    box = f"{job.scratch}/sandbox-{os.getpid()}-{os.urandom(8).hex()}"
    os.mkdir(box, 0o700)
    try:
        _furnish(job, box)
        os.mkdir(f"{box}/home", 0o700)
        for path in (box, f"{box}/home"):
            os.chown(path, uid, uid if "uid" in job.layers else -1)
        program = _fork(lambda: _start_dropped(job, box, uid), report)
        _wait(program, job, report)
        # A program that has ended stays a zombie until here: its number still names its group.
        _kill_group(program)
        status = os.waitpid(program, 0)[1]
        _kill_strays(uid if "uid" in job.layers else None)
        report.send(f"exit {os.waitstatus_to_exitcode(status)}")
    finally:
        _remove(box)


def _start_dropped(job: Job, box: str, uid: int) -> NoReturn:
    if "uid" in job.layers:
        _drop_to(uid)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _exec_program(job, box, others=0 if "uid" in job.layers else _count_threads(uid))


def _wait(pid: int, job: Job, report: Report) -> None:
    """Until `pid` has ended, its wall time has run out or the caller has hung up."""
    poller = select.poll()
    poller.register(os.pidfd_open(pid), select.POLLIN)
    poller.register(0, select.POLLIN)
    if not poller.poll(job.wall_s * 1000):
        report.send("timeout yes")


def _init(job: Job, report: Report, uid: int) -> None:
    _build_root(job, uid)
    if "uid" in job.layers:
        _drop_to(uid)
        if "user" in job.layers:
            _enter_user_namespace()
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _drop_capabilities()
    _prctl(PR_SET_DUMPABLE, 0)  # the program may not open this process's descriptors
    program = _fork(lambda: _exec_program(job, BOX, others=1 if "uid" in job.layers else 2), report)
    report.send(f"exit {_reap(program, job.memory_bytes)}")
    os._exit(0)


def _reap(program: int, memory_bytes: int) -> int:
    """Collect every process of the namespace until `program` ends; its exit status, -n for signal n.

    The address-space limit holds per process, so their sum is watched here.
    """
    poller = select.poll()
    poller.register(os.pidfd_open(program), select.POLLIN)
    while True:
        if not poller.poll(MEMORY_POLL_MS) and _memory_in_use() > memory_bytes:
            os.kill(program, signal.SIGKILL)
        pid = -1
        while pid:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == program:
                return os.waitstatus_to_exitcode(status)


def _memory_in_use() -> int:
    """Bytes resident in the namespace, shared pages split between their holders; 0 without /proc."""
    pids = [name for name in os.listdir("/proc") if name.isdigit()]
    return sum(_proportional_bytes(pid) for pid in pids) if len(pids) > 2 else 0


def _proportional_bytes(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(b"Pss:")), 0)
    except OSError:
        return 0


def _build_root(job: Job, uid: int) -> None:
    """Make a small tmpfs the root, with what Python needs read-only and one writable directory."""
    _check(libc.unshare(NEW_NS | NEW_NET | NEW_IPC | NEW_UTS), "unshare namespaces")
    _check(libc.sethostname(b"sandbox", 7), "set the host name")
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=64m,mode=0755")
    os.mkdir("/tmp" + OLD_ROOT)
    pivot_root = SYS_PIVOT_ROOT[os.uname().machine]
    _check(libc.syscall(pivot_root, b"/tmp", b"/tmp" + OLD_ROOT.encode()), "pivot_root")
    os.chdir("/")
    for source, path in job.visible:
        _bind(source, path)
        _make_read_only(path, recursive=True)
    for path in DEVICES:
        _bind(path, path)
    if job.hidden:
        _mount("tmpfs", job.hidden, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k")
    _furnish(job, BOX)
    _add_scratch(job, uid)
    _mount_proc()
    _check(libc.umount2(OLD_ROOT.encode(), MNT_DETACH), "detach the old root")
    os.rmdir(OLD_ROOT)
    _make_read_only("/", recursive=False)


def _add_scratch(job: Job, uid: int) -> None:
    gid = uid if "uid" in job.layers else os.getgid()
    options = f"mode=0700,uid={uid},gid={gid},nr_inodes=16384,size={job.file_bytes}"
    for path in (f"{BOX}/home", "/dev/shm"):
        os.makedirs(path)
        _mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, options)
    if not os.path.lexists("/tmp"):
        os.symlink(f"{BOX}/home", "/tmp")


def _bind(source: str, path: str) -> None:
    source = OLD_ROOT + source
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, path, None, MS_BIND | MS_REC)


def _mount_proc() -> None:
    # A container that masks parts of its own /proc may not mount a fresh one: then there is none.
    os.mkdir("/proc")
    try:
        _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError:
        return


def _furnish(job: Job, box: str) -> None:
    """Write the program and a bare virtual environment whose one .pth names the package folders.

    Folders that a .pth names are importable, but the .pth files inside them are not read: editable
    installs and start-up hooks of the host's environment stay silent and cost nothing.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = f"{box}/lib/{version}/site-packages"
    os.makedirs(site)
    os.mkdir(f"{box}/bin")
    for name in ("python", "python3"):
        os.symlink(job.python, f"{box}/bin/{name}")
    home = os.path.dirname(job.python)
    _write(f"{box}/pyvenv.cfg", f"home = {home}\ninclude-system-site-packages = false\n")
    _write(f"{site}/packages.pth", "".join(f"{path}\n" for path in job.packages))
    _write(f"{box}/program.py", job.code)


def _exec_program(job: Job, box: str, others: int) -> NoReturn:
    """Become the program. `others` processes of its uid (init, launcher) come on top of its limit."""
    os.setsid()
    os.umask(0o077)
    os.chdir(f"{box}/home")
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    python = _readable_python(job.python, f"{box}/bin/python")
    cpu_s = max(1, round(job.cpu_s))
    _limit(resource.RLIMIT_CPU, cpu_s, cpu_s + 1)
    _limit(resource.RLIMIT_AS, job.memory_bytes)
    _limit(resource.RLIMIT_FSIZE, job.file_bytes)
    _limit(resource.RLIMIT_NOFILE, 256)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NPROC, job.processes + others)
    environment = {
        "PATH": f"{box}/bin:/usr/local/bin:/usr/bin:/bin",
        "HOME": f"{box}/home",
        "TMPDIR": f"{box}/home",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    # Unbuffered: what a program printed before its time ran out is kept.
    os.execve(python, [python, "-I", "-B", "-u", f"{box}/program.py"], environment)


def _readable_python(interpreter: str, linked: str) -> str:
    """The environment's interpreter, or the system's where another uid may not reach the first."""
    if os.access(interpreter, os.X_OK):
        return linked
    for candidate in SYSTEM_PYTHONS:
        if os.access(candidate, os.X_OK):
            return candidate
    raise OSError(f"uid {os.getuid()} cannot read {interpreter}, and there is no system Python")


def _limit(which: int, soft: int, hard: int | None = None) -> None:
    hard = soft if hard is None else hard
    ceiling = resource.getrlimit(which)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(which, (soft, hard))


def _unused_uid() -> int:
    """A uid from the upper half of what is mapped here, set apart by the launcher's own PID.

    The process limit counts per uid, and root is exempt from it: one uid per program makes it bind.
    """
    with open("/proc/self/uid_map", encoding="ascii") as lines:
        first, count = max(((int(i), int(n)) for i, _, n in map(str.split, lines)), key=lambda pair: pair[1])
    half = min(count, 1 << 31) // 2
    if half < 1000:
        raise OSError("no spare uid is mapped in this user namespace")
    return first + half + os.getpid() % (half - 1)


def _drop_to(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    _prctl(PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root and the uid map cannot be written


def _enter_user_namespace() -> None:
    uid, gid = os.getuid(), os.getgid()
    _check(libc.unshare(NEW_USER), "unshare the user namespace")
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")
    try:
        _write("/proc/sys/user/max_user_namespaces", "0")  # no nested namespace with fresh capabilities
    except OSError:
        return


def _drop_capabilities() -> None:
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            break
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()), "drop capabilities")


def _kill_group(leader: int) -> None:
    with_group = os.getpgid(leader) == leader  # not so before the program's setsid
    (os.killpg if with_group else os.kill)(leader, signal.SIGKILL)


def _kill_strays(uid: int | None) -> None:
    """Kill and collect all that is left: everything of the program's own uid, or else every descendant."""
    if uid is not None and os.fork() == 0:
        # From a process of that uid, kill(-1) reaches exactly the uid's processes, all at once.
        os.setresuid(uid, uid, uid)
        try:
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    while children := _children():
        for pid in children if uid is None else ():
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)


def _remove(box: str) -> None:
    for folder, names, _ in os.walk(box):
        for path in (f"{folder}/{name}" for name in names):
            if not os.path.islink(path):
                os.chmod(path, 0o700)  # a folder without rights could not be emptied
    shutil.rmtree(box, ignore_errors=True)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as text:
        return [int(pid) for pid in text.read().split()]


def _count_threads(uid: int) -> int:
    count = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return count


def _fork(body: Callable[[], None], report: Report) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
    except BaseException as error:
        report.send(f"error {error}")
    os._exit(1)


def _make_read_only(path: str, *, recursive: bool) -> None:
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    flags = AT_RECURSIVE if recursive else 0
    result = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, size)
    _check(result, f"make {path} read-only")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    source_, kind_, data_ = (None if text is None else text.encode() for text in (source, kind, data))
    _check(libc.mount(source_, target.encode(), kind_, ctypes.c_ulong(flags), data_), f"mount {target}")


def _prctl(option: int, value: int) -> None:
    _check(libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot {what}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogatepass") as out:
        out.write(text)
