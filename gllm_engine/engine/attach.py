"""Decides which engine process serves a model, and lets front ends join or replace it.

All front ends of one loaded model share one engine process. They agree on it through a record in a
private directory. A front end changes the record only while it holds a file lock:

    <root>/<owner pid>.<owner start time>/<scope hash>/
        lock                file lock around every change
        record.json         generation, engine process, fingerprint, attached front ends
        <generation>/       one directory for each engine process
            config.json     written by the front end that starts the engine
            engine.sock     the engine's socket
            error           the sentence an engine leaves when it fails

The owner is the process that the engine must not outlive (tritonserver). A front end that holds
the lock either joins the recorded engine or starts the next generation:

    recorded engine alive, same fingerprint, same load   -> join generation N
    the same, new load, a recorded front end is dead     -> join generation N
    recorded engine dead, other fingerprint or new load  -> end generation N, start N + 1

The second rule is a repair: Triton replaces a dead front end only by a new load, for which the
engine and the streams of the other front ends need not end.

The fingerprint covers the software, the configuration and the checkpoint's files. The old engine
finishes its sequences, for a bounded time, before the next engine starts, because both need the
same memory.

Knows processes and files; nothing of messages or models.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gllm_engine.config import EngineConfig
from gllm_engine.os_process import Process, kill, pid_namespace, stop
from gllm_engine.socket_directory import socket_parent
from gllm_engine.software import software

log = logging.getLogger("gllm.attach")

# Read at import, because the code on disk may change while this process runs.
_SOFTWARE = software()
_SOCKET = "engine.sock"
# Process ids have at most 7 digits; ten digits of clock ticks are three years.
_LONGEST_HOME = "4194304.9999999999/0123456789ab/99999"


class EngineError(RuntimeError):
    """The engine could not be started or joined; the message says why."""


class StaleFrontEnd(EngineError):
    """A newer load of the same model is serving; this front end must not attach again."""


class EngineRecord(msgspec.Struct):
    """The content of record.json: the current engine and the front ends attached to it."""

    scope: str
    generation: int = 0
    engine: Process | None = None
    fingerprint: str = ""
    front_ends: dict[str, Process] = {}  # by instance name


@dataclass(frozen=True)
class Attached:
    """The engine that a front end is attached to, and a pidfd that reports the engine's end."""

    directory: Path
    engine: Process
    pidfd: int  # readable once the engine has ended; the caller closes it
    child: subprocess.Popen[bytes] | None  # set only in the front end that started the engine

    @property
    def address(self) -> str:
        return socket_address(self.directory)

    def why_it_died(self) -> str:
        """The sentence in the engine's error file, or a general sentence if there is no file."""
        code = self.child.wait() if self.child is not None else None
        dead = "the engine process died" + ("" if code is None else f" (exit status {code})")
        return _last_word(self.directory) or dead

    def end_silent(self, silence: str) -> str:
        """Kill an engine that no longer answers; returns the sentence for its streams.

        `silence`: what it has failed to do. An engine in a call to a device that never returns
        does not even die; the streams must not wait for that.
        """
        why = f"{silence}: it is stopped, or hangs; it is killed"
        log.error("process %d: %s", self.engine.pid, why)
        kill(self.pidfd)
        return _last_word(self.directory) or why


def socket_address(directory: Path) -> str:
    """The socket address of the engine whose directory this is."""
    return f"ipc://{directory}/{_SOCKET}"


def _last_word(directory: Path) -> str | None:
    """The sentence in the engine's error file; None if there is no file."""
    with contextlib.suppress(FileNotFoundError):
        return (directory / "error").read_text(encoding="utf-8")
    return None


def attach(
    config: EngineConfig, scope: str, instance: str, owner_pid: int, again: bool = False
) -> Attached:
    """Join the engine of `scope`, or start one. `instance`: this front end's name in the scope.

    `again`: this front end was attached before and lost its engine. Only a first attachment, which
    is a load of the model, may replace a running engine.

    Raises StaleFrontEnd when a newer load of the model has taken over, EngineError when no engine
    can be started. Blocks while the old engine finishes its sequences.
    """
    me = Process.of(os.getpid())
    owner = Process.of(owner_pid)
    if me is None or owner is None:
        raise EngineError(f"process {owner_pid}, which the engine should live with, has ended")
    home = _home(owner, scope)
    with _locked(home):
        record = _read(home, scope)
        is_empty = record.engine is None
        try:
            return _attach(home, record, config, instance, me, owner, again)
        except BaseException:
            if is_empty:  # a failed or stale front end leaves nothing behind
                _remove(home)
            raise


def _attach(
    home: Path,
    record: EngineRecord,
    config: EngineConfig,
    instance: str,
    me: Process,
    owner: Process,
    again: bool,
) -> Attached:
    """`attach` under the lock."""
    fingerprint = _fingerprint(config)
    _refuse_stale(record, instance, me, fingerprint, again)
    holder = record.front_ends.get(instance)
    child = None
    is_new_load = holder not in (None, me)
    is_repair = is_new_load and any(not front.alive for front in record.front_ends.values())
    usable = _running(record) and record.fingerprint == fingerprint
    if not usable or (is_new_load and not is_repair):
        _retire(record.engine, config.drain_timeout_s)
        record.front_ends = _same_load(record, holder, me, fingerprint)
        child = _replace(home, record, config, owner)
        record.fingerprint = fingerprint
    elif is_repair:
        record.front_ends = {}  # the old load's living front ends only finish their streams
    assert record.engine is not None
    record.front_ends[instance] = me
    directory = home / str(record.generation)
    try:
        _write(home, record)
        pidfd = record.engine.open()
    except ProcessLookupError:
        died = "the engine process died while a front end was joining"
        raise EngineError(_last_word(directory) or died) from None
    except OSError:
        if child is not None:
            child.kill()  # the engine is not on record, so no front end could find it
        raise
    return Attached(directory, record.engine, pidfd, child)


def _refuse_stale(
    record: EngineRecord, instance: str, me: Process, fingerprint: str, again: bool
) -> None:
    """Raise StaleFrontEnd if the record belongs to a newer load of the model than ours."""
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
    """The recorded front ends that stay on record when the engine is replaced.

    If only the engine died, all front ends stay. If a new load takes over (another process holds
    our instance name, or the fingerprint changed), the old load's front ends leave the record. A
    front end of the new load may have joined the old engine before us. It stays: it is younger
    than the process that held our instance name.
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
    # The previous generation's directory stays: other front ends may still read its error file.
    _discard(home / str(record.generation - 1))
    record.generation += 1
    directory = home / str(record.generation)
    child = _start(directory, config, owner)
    record.engine = Process.of(child.pid)
    if record.engine is None:
        ended = f"the engine process ended at once (status {child.wait()})"
        raise EngineError(_last_word(directory) or ended)
    return child


def detach(
    attached: Attached, instance: str, say_goodbye: Callable[[], None], patience_s: float
) -> None:
    """Take this front end off the record. The last front end ends the recorded engine.

    The engine is killed after `patience_s` seconds. `say_goodbye` sends the Goodbye message to the
    engine. It runs under the lock, so that no front end joins an engine that is about to end.

    The recorded engine may be a later one than `attached`: another front end has replaced a dead
    engine, and has left before this one could join its successor.
    """
    home = attached.directory.parent
    if not home.is_dir():
        return
    with _locked(home):
        record = _read(home, "")
        on_record = record.front_ends.get(instance) == Process.of(os.getpid())
        if on_record:
            del record.front_ends[instance]
            _write(home, record)
        say_goodbye()
        is_last = not any(front.alive for front in record.front_ends.values())
        if is_last and (on_record or record.engine in (None, attached.engine)):
            # SIGTERM, because front ends that left the record at a repair may still be attached.
            _retire(record.engine, patience_s)
            _remove(home)


def sweep() -> None:
    """Remove the directories of owners that have ended. Public, for whoever starts owners.

    An engine or a front end that is killed while it starts cannot do it.
    """
    for path in _root().iterdir():
        pid, _, start = path.name.partition(".")
        if pid.isdigit() and start.isdigit() and not Process(int(pid), int(start)).alive:
            _discard(path)


def _root() -> Path:
    """A directory that only this user can enter. Raises OSError, or EngineError if others can."""
    name = f"gllm-{os.getuid()}-{pid_namespace()}"
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
    """Hold the lock of `home`. The last front end removes `home`, so it may be created again.

    The lock is on the directory itself: a lock file could be created in a directory that is being
    removed, and two processes would then hold two locks.
    """
    while True:
        try:
            home.mkdir(parents=True, exist_ok=True)
            directory = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, FileExistsError):  # another process has just moved `home` away
            continue
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            if _is_at(home, directory):
                yield
                return
        finally:
            os.close(directory)


def _is_at(path: Path, file: int) -> bool:
    """Whether the open file or directory is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _remove(home: Path) -> None:
    """Remove a locked directory. Move it away first: another process may create it again."""
    gone = Path(tempfile.mkdtemp(prefix=f"{home.name}.", dir=home.parent))
    home.rename(gone)
    _discard(gone)
    with contextlib.suppress(OSError):  # the directory of another model keeps the parent
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
    """A hash of the software, the configuration, and each checkpoint file's size and time."""
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
    """A file's size and modification time; for a dangling link, those of the link itself."""
    for follow in (True, False):
        with contextlib.suppress(OSError):
            status = path.stat(follow_symlinks=follow)
            return b" %d %d" % (status.st_size, status.st_mtime_ns)
    return b" gone"


def _running(record: EngineRecord) -> bool:
    return record.engine is not None and record.engine.alive


def _retire(engine: Process | None, patience_s: float) -> None:
    """Let an engine finish its sequences for at most `patience_s` seconds, then kill it."""
    if engine is None:
        return
    with contextlib.suppress(ProcessLookupError):  # the engine has ended by itself
        pidfd = engine.open()
        try:
            stop(pidfd, patience_s)
        finally:
            os.close(pidfd)


def _start(directory: Path, config: EngineConfig, owner: Process) -> subprocess.Popen[bytes]:
    _discard(directory)  # left by a start that failed before the engine was on record
    directory.mkdir(mode=0o700)
    (directory / "config.json").write_bytes(msgspec.json.encode(config))
    # Files in the server's working directory must not be importable, so the engine's working
    # directory is its own, which holds no code.
    command = [sys.executable, "-m", "gllm_engine.engine.process", str(directory), str(owner.pid)]
    # A new session: Ctrl-C at the server's terminal must not end the engine before its streams.
    child = subprocess.Popen(
        command, cwd=directory, stdin=subprocess.DEVNULL, start_new_session=True
    )
    # The engine may end after this front end has detached; the thread then reaps the zombie.
    threading.Thread(target=child.wait, name="engine-reaper", daemon=True).start()
    return child


def _discard(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
