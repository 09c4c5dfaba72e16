"""The sandbox: what a program can reach, what stops it, and what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_app.errors import SandboxError
from ray_app.sandbox import SandboxLimits, available_isolation, candidate_layers, run_python

SECRET = "sk-not-a-real-key-4711"
REPOSITORY = Path(__file__).resolve().parent.parent
FALLBACK = candidate_layers()[-1]
QUICK = SandboxLimits(wall_s=20, cpu_s=10)
FORK_BOMB = """
import os
open("/proc/self/comm", "w").write(MARK)
print("armed")
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


@pytest.fixture(params=["strongest", "fallback"])
def layers(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Both ends of the range, so that a machine with namespaces tests the other way too."""
    return available_isolation() if request.param == "strongest" else FALLBACK


def need(*wanted: str) -> None:
    missing = set(wanted) - set(available_isolation())
    if missing:
        pytest.skip(f"not available on this machine: {', '.join(sorted(missing))}")


def processes_with(mark: str) -> list[Path]:
    """The running processes that carry `mark` in an argument or its first 15 letters as their name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            texts = (folder / "cmdline").read_text(errors="replace"), (folder / "comm").read_text()
            if mark in texts[0] or mark[:15] in texts[1]:
                found.append(folder)
    return found


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def until(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    """Wait for a change in another process that tells nobody; fail when it does not come."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def marked_sleeper(mark: str) -> str:
    """Code that leaves a grandchild in a session of its own, visible by `mark`, and waits."""
    return f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", {mark!r}], start_new_session=True)
print("started", flush=True)
time.sleep(300)
"""


async def test_returns_stdout_stderr_and_exit_status(layers: tuple[str, ...]) -> None:
    code = "import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(7)"
    result = await run_python(code, QUICK, layers)
    assert (result.stdout, result.stderr, result.exit_status) == ("out\n", "err\n", 7)
    assert not result.is_timed_out
    assert result.isolation == layers
    assert 0 < result.duration_s < QUICK.wall_s


async def test_shows_the_traceback_with_its_source_line(layers: tuple[str, ...]) -> None:
    result = await run_python("x = 1\nprint(x / 0)", QUICK, layers)
    assert result.exit_status == 1
    assert "print(x / 0)" in result.stderr
    assert "ZeroDivisionError" in result.stderr


async def test_a_signal_is_a_negative_exit_status(layers: tuple[str, ...]) -> None:
    result = await run_python("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", QUICK, layers)
    assert result.exit_status == -15


async def test_unicode_survives_and_bytes_that_are_no_text_are_replaced(layers: tuple[str, ...]) -> None:
    code = "import sys\nprint('größe ∑ 漢字 🧪')\nsys.stderr.buffer.write(b'a\\xffb')"
    result = await run_python(code, QUICK, layers)
    assert result.stdout == "größe ∑ 漢字 🧪\n"
    assert result.stderr == "a\ufffdb"


@pytest.mark.parametrize("code", ["print('\ud800')", "x = '\0'", "def ("])
async def test_text_that_is_no_program_fails_as_a_program(code: str) -> None:
    result = await run_python(code, QUICK)
    assert result.exit_status == 1
    assert "SyntaxError" in result.stderr


async def test_long_code_arrives_whole() -> None:
    result = await run_python("x = 0\n" + "x += 1\n" * 100_000 + "print(x)", QUICK)
    assert result.stdout == "100000\n"


async def test_starts_from_an_almost_empty_environment(
    layers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_API_KEY", SECRET)
    code = "import os, json\nprint(json.dumps(dict(os.environ)))"
    names = json.loads((await run_python(code, QUICK, layers)).stdout)
    assert set(names) == {"PATH", "HOME", "TMPDIR", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}


@pytest.fixture
def secret_holder() -> Iterator[Path]:
    """A running process of this user with the secret in its environment; its /proc folder."""
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with subprocess.Popen(command, env={"MODEL_API_KEY": SECRET}, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        folder = Path(f"/proc/{process.pid}")
        assert SECRET in (folder / "environ").read_text()
        yield folder
        process.kill()


async def test_finds_no_secret_in_any_process_environment(
    layers: tuple[str, ...], secret_holder: Path
) -> None:
    if layers == ("rlimits",):
        pytest.skip("the same user's processes are readable where only rlimits hold")
    code = f"""
import glob
for path in glob.glob("/proc/*/environ") + ["{secret_holder}/environ"]:
    try:
        print({SECRET[3:]!r} in open(path, errors="replace").read())
    except OSError:
        print("refused")
"""
    found = (await run_python(code, QUICK, layers)).stdout.split()
    assert "False" in found  # its own
    assert "refused" in found
    assert "True" not in found


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user may read, so that only the sandbox keeps a program out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "questions.jsonl").write_text('{"answer": "42"}')
        yield folder


async def test_sees_no_dataset_file_and_no_checkout(public_folder: Path) -> None:
    need("mount")
    checkout = [REPOSITORY / "pyproject.toml", REPOSITORY / "ray_app" / "sandbox.py"]
    hidden = [public_folder / "questions.jsonl", *checkout, Path("/etc/passwd")]
    assert [path for path in hidden if not os.access(path, os.R_OK)] == []
    code = f"import os\nprint([path for path in {[str(path) for path in hidden]!r} if os.path.exists(path)])"
    assert (await run_python(code, QUICK)).stdout == "[]\n"


async def test_sees_only_the_places_that_python_needs() -> None:
    need("mount")
    code = """
import os
print(sorted(os.listdir("/dev")), os.listdir("."), os.listdir("/tmp"))
for path in ("/", "/usr/lib", "/sandbox", os.__file__, os.path.dirname(os.__file__) + "/new"):
    try:
        open(path + "/new" if os.path.isdir(path) else path, "w")
        print("wrote", path)
    except OSError as error:
        print(error.strerror)
"""
    first, *writes = (await run_python(code, QUICK)).stdout.splitlines()
    # An environment below /tmp is where it is, and nothing beside it.
    parts = Path(sys.prefix).parts
    in_tmp = [parts[2]] if parts[:2] == ("/", "tmp") else []
    assert first == f"['null', 'shm', 'urandom', 'zero'] [] {in_tmp}"
    assert writes == ["Read-only file system"] * 5


async def test_sees_only_its_own_processes_and_holds_no_privilege() -> None:
    need("pid", "user")
    code = """
import ctypes, os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
names = ("CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")
print([int(status[name], 16) for name in names])
print(os.getuid() != 0, sorted(name for name in os.listdir("/proc") if name.isdigit()))
print([ctypes.CDLL(None).unshare(flag) for flag in (0x10000000, 0x20000)])
print([os.access(path, os.R_OK) for path in ("/proc/self/fd", "/proc/1/fd", "/proc/1/environ")])
"""
    result = await run_python(code, QUICK)
    privileges, processes, namespaces, init = result.stdout.splitlines()
    assert privileges == "[0, 0, 0, 0, 1]"
    assert processes == "True ['1', '2']"
    assert namespaces == "[-1, -1]"
    assert init == "[True, False, False]"


async def test_two_programs_do_not_see_each_others_files(layers: tuple[str, ...]) -> None:
    if layers == ("rlimits",):
        pytest.skip("programs share the user where only rlimits hold")
    mark = uuid.uuid4().hex
    write = f"""
import os, sys
open({mark!r}, "w").write("x")
os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(300)", {mark!r}])
"""
    look = f"""
import glob, os
for folder in (*glob.glob("/tmp/sandbox-*"), "/tmp", "/sandbox", "/dev/shm", os.getcwd()):
    print(*glob.glob(os.path.join(folder, {mark!r})), *glob.glob(os.path.join(folder, "*", {mark!r})))
"""
    writer = asyncio.create_task(run_python(write, QUICK, layers))
    await until(lambda: processes_with(mark))  # it has written
    assert (await run_python(look, QUICK, layers)).stdout.strip() == ""
    writer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writer


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        yield server


async def test_reaches_no_network(listener: socket.socket) -> None:
    need("network")
    code = f"""
import json, socket
for address in ({listener.getsockname()!r}, ("192.0.2.1", 80)):
    try:
        socket.create_connection(address, timeout=5)
        print("connected")
    except OSError as error:
        print(error.strerror)
print(json.dumps([name for _, name in socket.if_nameindex()]))
"""
    result = await run_python(code, QUICK)
    assert result.stdout.splitlines()[:2] == ["Network is unreachable"] * 2
    assert set(json.loads(result.stdout.splitlines()[2])) <= {"lo", "sit0", "tunl0", "ip6tnl0"}
    with socket.create_connection(listener.getsockname(), timeout=5):  # the listener itself is in order
        listener.accept()[0].close()


async def test_fork_bomb_ends_and_leaves_nothing(layers: tuple[str, ...]) -> None:
    mark = uuid.uuid4().hex
    before = time.monotonic()
    result = await run_python(FORK_BOMB.replace("MARK", repr(mark)), SandboxLimits(wall_s=1.5), layers)
    assert (result.is_timed_out, result.stdout) == (True, "armed\n")
    assert time.monotonic() - before < 8
    assert not processes_with(mark)


async def test_process_limit_binds(layers: tuple[str, ...]) -> None:
    mark = uuid.uuid4().hex
    code = f"""
import os, time
open("/proc/self/comm", "w").write({mark!r})
count = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(300)
        count += 1
except OSError:
    print(count)
"""
    result = await run_python(code, SandboxLimits(wall_s=20, processes=8), layers)
    if layers == ("rlimits",):  # the limit counts the user's other processes, which come and go
        assert int(result.stdout) < 100
    else:
        assert result.stdout == "7\n"
    assert not processes_with(mark)


async def test_endless_output_is_stopped_and_bounded(layers: tuple[str, ...]) -> None:
    code = "print('first')\nwhile True:\n    print('y' * 1000)"
    limits = SandboxLimits(wall_s=30, output_bytes=10_000)
    result = await run_python(code, limits, layers)
    assert result.exit_status == -9
    assert not result.is_timed_out
    assert result.stdout.startswith("first\n")
    assert len(result.stdout) < 10_100


async def test_long_output_keeps_its_beginning_and_its_end() -> None:
    result = await run_python("print('A' + 'x' * 30_000 + 'Z')", SandboxLimits(output_bytes=4000))
    assert result.exit_status == 0
    assert result.stdout[0] == "A"
    assert result.stdout.endswith("Z\n")
    assert "[... 26003 bytes left out ...]" in result.stdout


async def test_memory_hog_fails_in_its_own_process(layers: tuple[str, ...]) -> None:
    result = await run_python("x = bytearray(400 << 20)", SandboxLimits(memory_bytes=200 << 20), layers)
    assert result.exit_status == 1
    assert "MemoryError" in result.stderr


async def test_memory_is_limited_over_all_processes() -> None:
    need("pid")
    code = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        x = b"x" * (60 << 20)
        time.sleep(300)
time.sleep(300)
"""
    result = await run_python(code, SandboxLimits(wall_s=20, memory_bytes=200 << 20))
    assert (result.exit_status, result.is_timed_out) == (-9, False)


async def test_cpu_limit_ends_a_busy_loop(layers: tuple[str, ...]) -> None:
    result = await run_python("while True: pass", SandboxLimits(wall_s=20, cpu_s=1), layers)
    assert (result.exit_status, result.is_timed_out) == (-24, False)


async def test_files_are_limited_in_size(layers: tuple[str, ...]) -> None:
    code = "try:\n    open('big', 'wb').write(bytes(3 << 20))\nexcept OSError:\n    print('refused')"
    result = await run_python(code, SandboxLimits(wall_s=20, file_bytes=1 << 20), layers)
    assert result.stdout == "refused\n"


async def test_wall_limit_kills_grandchildren_and_keeps_the_output(layers: tuple[str, ...]) -> None:
    mark = uuid.uuid4().hex
    result = await run_python(marked_sleeper(mark), SandboxLimits(wall_s=1), layers)
    assert result.is_timed_out
    assert result.exit_status == -9
    assert result.stdout == "started\n"
    assert not processes_with(mark)


async def test_grandchildren_end_with_the_program(layers: tuple[str, ...]) -> None:
    mark = uuid.uuid4().hex
    code = marked_sleeper(mark).replace("time.sleep(300)\n", "\n")
    result = await run_python(code, QUICK, layers)
    assert (result.exit_status, result.stdout) == (0, "started\n")
    assert not processes_with(mark)


async def test_cancelling_kills_the_tree_and_is_not_swallowed(layers: tuple[str, ...]) -> None:
    mark = uuid.uuid4().hex
    task = asyncio.create_task(run_python(marked_sleeper(mark), SandboxLimits(), layers))
    await until(lambda: processes_with(mark))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not processes_with(mark)


async def test_the_tree_ends_when_the_caller_dies(layers: tuple[str, ...]) -> None:
    mark = uuid.uuid4().hex
    caller = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import asyncio, sys\nfrom ray_app.sandbox import run_python, SandboxLimits\n"
        "asyncio.run(run_python(sys.stdin.read(), SandboxLimits(), tuple(sys.argv[1:])))",
        *layers,
        stdin=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert caller.stdin
    caller.stdin.write(marked_sleeper(mark).encode())
    caller.stdin.close()
    await until(lambda: processes_with(mark))
    caller.kill()
    await caller.wait()
    await until(lambda: not processes_with(mark))


async def test_many_programs_run_at_once_while_the_event_loop_turns() -> None:
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)

    watcher = asyncio.create_task(watch())
    results = await asyncio.gather(*(run_python(f"print({i})", QUICK) for i in range(64)))
    watcher.cancel()
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(64)]
    assert longest < 2.0


@pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="numpy is not installed")
async def test_installed_packages_are_importable() -> None:
    need("mount")
    result = await run_python("import numpy\nprint(numpy.linalg.det(numpy.eye(3)))", QUICK)
    assert (result.stdout, result.stderr) == ("1.0\n", "")


async def test_the_fallback_says_what_it_lacks() -> None:
    result = await run_python("import os\nprint(os.getuid())", QUICK, FALLBACK)
    assert result.isolation == FALLBACK
    assert "network" not in result.isolation
    if "uid" in FALLBACK:
        assert int(result.stdout) not in (0, os.getuid())


async def test_the_fallback_leaves_no_directory(monkeypatch: pytest.MonkeyPatch, public_folder: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(public_folder))
    code = "import os\nopen('kept', 'w').write('x')\nos.makedirs('a/b')\nos.chmod('a', 0)\nprint(os.getcwd())"
    result = await run_python(code, QUICK, FALLBACK)
    assert result.stdout.startswith(str(public_folder))
    assert names_in(public_folder) == ["questions.jsonl"]


async def test_layers_that_are_not_offered_are_refused() -> None:
    with pytest.raises(SandboxError, match="not offered here"):
        await run_python("pass", QUICK, ("network",))


async def test_a_sandbox_that_cannot_start_is_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(SandboxError, match=r"could not run the program: .*No such file"):
        await run_python("pass", QUICK, FALLBACK)
