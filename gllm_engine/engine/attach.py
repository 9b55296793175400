"""Which engine process serves a model, and who may join or replace it.

All front ends of one loaded model share one engine process. They agree through a record in a
private directory, changed only under a file lock:

    <root>/<owner pid>.<its start time>/<scope hash>/
        lock  record.json  <generation>/{config.json, engine.sock, error}

The owner is the process that the engine must not outlive (tritonserver). A front end *joins* the
engine on record when that is of the same software and serves the same files and configuration; it
starts the next generation when that engine is dead, serves something else, or belongs to an earlier
load of the model. The earlier engine then finishes what it runs, for a bounded time, before the
next one starts: both would need the same memory.

Knows processes and files; nothing of messages or models.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gllm_engine.config import EngineConfig
from gllm_engine.os_process import Process, wait_end
from gllm_engine.socket_directory import socket_parent
from gllm_engine.software import software

# Now, because code on disk may change under a process that runs.
_SOFTWARE = software()
_SOCKET = "engine.sock"
# Process ids have at most 7 digits; ten digits of clock ticks are three years.
_LONGEST_HOME = "4194304.9999999999/0123456789ab/99999"


class EngineError(RuntimeError):
    """The engine could not be started or joined; the message says why."""


class StaleFrontEnd(EngineError):
    """A newer load of the same model is serving; this front end must not attach again."""


class EngineRecord(msgspec.Struct):
    """What record.json holds: the current engine and the front ends attached to it."""

    scope: str
    generation: int = 0
    engine: Process | None = None
    fingerprint: str = ""
    front_ends: dict[str, Process] = {}  # by instance name


@dataclass(frozen=True)
class Attached:
    """The engine that a front end is to talk to, and how to see it die."""

    directory: Path
    engine: Process
    pidfd: int  # readable once the engine has ended; the caller closes it
    child: subprocess.Popen[bytes] | None  # set in the front end that started it

    @property
    def address(self) -> str:
        return socket_address(self.directory)

    def why_it_died(self) -> str:
        """The sentence the engine left behind, or that it left none."""
        code = self.child.wait() if self.child is not None else None
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / "error").read_text(encoding="utf-8")
        return "the engine process died" + ("" if code is None else f" (exit status {code})")


def socket_address(directory: Path) -> str:
    """Where the engine that has this directory listens."""
    return f"ipc://{directory}/{_SOCKET}"


def attach(
    config: EngineConfig, scope: str, instance: str, owner_pid: int, again: bool = False
) -> Attached:
    """Join the engine of `scope`, or start it. `instance` names this front end among its peers.

    `again`: this front end was attached before and lost its engine. Only a first attachment, which
    is a load of the model, may replace a running engine.

    Raises StaleFrontEnd when a newer load of the model has taken over, EngineError when no engine
    can be started. Blocks while an earlier engine finishes its work.
    """
    me = Process.of(os.getpid())
    owner = Process.of(owner_pid)
    if me is None or owner is None:
        raise EngineError(f"process {owner_pid}, which the engine should live with, has ended")
    home = _home(owner, scope)
    with _locked(home):
        record = _read(home, scope)
        fingerprint = _fingerprint(config)
        _refuse_stale(record, instance, me, fingerprint, again)
        holder = record.front_ends.get(instance)
        child = None
        if holder not in (None, me) or record.fingerprint != fingerprint or not _running(record):
            _retire(record.engine, config.drain_timeout_s)
            record.front_ends = _same_load(record, holder, me, fingerprint)
            child = _replace(home, record, config, owner)
            record.fingerprint = fingerprint
        assert record.engine is not None
        record.front_ends[instance] = me
        try:
            _write(home, record)
            pidfd = os.pidfd_open(record.engine.pid)
        except ProcessLookupError:
            raise EngineError("the engine process died while a front end was joining") from None
        except OSError:
            if child is not None:
                child.kill()  # nobody else could find it
            raise
        return Attached(home / str(record.generation), record.engine, pidfd, child)


def _refuse_stale(
    record: EngineRecord, instance: str, me: Process, fingerprint: str, again: bool
) -> None:
    """Raise StaleFrontEnd if the record belongs to a load of the model newer than ours."""
    holder = record.front_ends.get(instance)
    if again:
        stale = holder != me or (_running(record) and record.fingerprint != fingerprint)
    else:
        stale = holder not in (None, me) and holder.alive and holder.start > me.start
    if stale:
        raise StaleFrontEnd("a newer load of this model is serving")


def _same_load(
    record: EngineRecord, holder: Process | None, me: Process, fingerprint: str
) -> dict[str, Process]:
    """The front ends on record that stay when their engine is replaced.

    All of them after a mere death. When a new load takes over (another process holds our name, or
    the files changed) those of the old one go; a peer of ours that came first had joined the old
    engine, and is known by being younger than the process whose name we take.
    """
    if record.fingerprint != fingerprint:
        return {}
    if holder in (None, me):
        return record.front_ends
    return {name: p for name, p in record.front_ends.items() if p.start > holder.start}


def _replace(
    home: Path, record: EngineRecord, config: EngineConfig, owner: Process
) -> subprocess.Popen[bytes]:
    """Start the next generation's engine and put it on record."""
    # The last one's directory stays: other front ends may still come to read why it ended.
    _discard(home / str(record.generation - 1))
    record.generation += 1
    child = _start(home / str(record.generation), config, owner)
    record.engine = Process.of(child.pid)
    if record.engine is None:
        raise EngineError(f"the engine process ended at once (status {child.wait()})")
    return child


def detach(
    attached: Attached, instance: str, say_goodbye: Callable[[], None], patience_s: float = 10.0
) -> None:
    """Take this front end off the record; the last one waits for the engine's end, or ends it.

    `say_goodbye` tells the engine; it runs under the lock, so that nobody joins an engine that is
    about to end.
    """
    home = attached.directory.parent
    if not home.is_dir():
        return
    with _locked(home):
        record = _read(home, "")
        if record.front_ends.get(instance) == Process.of(os.getpid()):
            del record.front_ends[instance]
            _write(home, record)
        say_goodbye()
        current = record.engine == attached.engine
        if not current or any(front.alive for front in record.front_ends.values()):
            return
        if not wait_end(attached.pidfd, patience_s):
            os.kill(attached.engine.pid, signal.SIGKILL)
            wait_end(attached.pidfd, patience_s)
        if attached.child is not None:
            attached.child.wait()
        _remove(home)


def sweep() -> None:
    """Remove what owners that no longer live have left in the private directory."""
    for path in _root().iterdir():
        pid, _, start = path.name.partition(".")
        if pid.isdigit() and start.isdigit() and not Process(int(pid), int(start)).alive:
            _discard(path)


def discard_owner(owner: Process) -> None:
    """Remove all that is kept for an owner that has ended."""
    _discard(_root() / f"{owner.pid}.{owner.start}")


def _root() -> Path:
    """A directory that only this user can enter. Raises OSError, or EngineError if others can."""
    namespace = os.stat("/proc/self/ns/pid").st_ino  # pids mean nothing in another container
    name = f"gllm-{os.getuid()}-{namespace}"
    root = socket_parent(below=len(f"/{name}/{_LONGEST_HOME}/{_SOCKET}")) / name
    root.mkdir(mode=0o700, exist_ok=True)
    status = root.lstat()
    if root.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise EngineError(f"{root} must be a directory of this user with mode 0700")
    return root


def _home(owner: Process, scope: str) -> Path:
    name = hashlib.sha256(scope.encode()).hexdigest()[:12]
    home = _root() / f"{owner.pid}.{owner.start}" / name
    if not home.is_dir():
        sweep()
    return home


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Alone with `home`, which the last front end removes: so it may have to be made again."""
    path = home / "lock"
    while True:
        try:
            home.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except (FileNotFoundError, FileExistsError):  # mkdir's, of a directory just moved away
            continue
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # else it was removed while we waited for it
                yield
                return


def _remove(home: Path) -> None:
    """End the use of a locked directory. Moved first: it is another's as soon as it can be made."""
    gone = Path(tempfile.mkdtemp(prefix=f"{home.name}.", dir=home.parent))
    home.rename(gone)
    _discard(gone)
    with contextlib.suppress(OSError):  # there is another model's
        home.parent.rmdir()


def _read(home: Path, scope: str) -> EngineRecord:
    path = home / "record.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=EngineRecord)
    except FileNotFoundError:
        return EngineRecord(scope)
    except msgspec.DecodeError as error:
        raise EngineError(f"{path} is not a record of this software ({error})") from None


def _write(home: Path, record: EngineRecord) -> None:
    fresh = home / "record.json.new"
    fresh.write_bytes(msgspec.json.encode(record))
    fresh.rename(home / "record.json")


def _fingerprint(config: EngineConfig) -> str:
    """Changes when the software, the configuration or any file of the checkpoint does."""
    digest = hashlib.sha256(_SOFTWARE.encode() + msgspec.json.encode(config))
    for directory in sorted({config.model, config.tokenizer or config.model}):
        try:
            paths = sorted(Path(directory).iterdir())
        except OSError as error:
            raise EngineError(f"{directory}: cannot be read ({error.strerror})") from None
        for path in paths:
            digest.update(os.fsencode(path) + _state(path) + b"\n")
    return digest.hexdigest()


def _state(path: Path) -> bytes:
    """What tells that a file has changed; of a link to nothing, the link's own."""
    for follow in (True, False):
        with contextlib.suppress(OSError):
            status = path.stat(follow_symlinks=follow)
            return b" %d %d" % (status.st_size, status.st_mtime_ns)
    return b" gone"


def _running(record: EngineRecord) -> bool:
    return record.engine is not None and record.engine.alive


def _retire(engine: Process | None, patience_s: float) -> None:
    """Let an engine finish what it runs, at most `patience_s`; then end it."""
    if engine is None or not engine.alive:
        return
    with contextlib.suppress(ProcessLookupError):  # it ends by itself meanwhile
        pidfd = os.pidfd_open(engine.pid)
        try:
            os.kill(engine.pid, signal.SIGTERM)
            if not wait_end(pidfd, patience_s):
                os.kill(engine.pid, signal.SIGKILL)
                wait_end(pidfd, 5.0)
        finally:
            os.close(pidfd)


def _start(directory: Path, config: EngineConfig, owner: Process) -> subprocess.Popen[bytes]:
    _discard(directory)  # of an attempt that failed before it was on record
    directory.mkdir(mode=0o700)
    (directory / "config.json").write_bytes(msgspec.json.encode(config))
    # What lies in the server's working directory must not be importable, so the engine works in
    # its own, which holds no code.
    command = [sys.executable, "-m", "gllm_engine.engine.process", str(directory), str(owner.pid)]
    # A session of its own: Ctrl-C at the server's terminal must not end it before the streams do.
    child = subprocess.Popen(
        command, cwd=directory, stdin=subprocess.DEVNULL, start_new_session=True
    )
    # It may outlive this front end's interest in it, and must not stay a zombie then.
    threading.Thread(target=child.wait, name="engine-reaper", daemon=True).start()
    return child


def _discard(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
