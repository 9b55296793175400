"""Processes of this machine: identify them, await or cause their end, end with another process.

This module knows pids and nothing of what a process does.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import select
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

# A killed process usually ends at once; one in a call to a device may never end.
KILLED_S = 5.0
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Process(msgspec.Struct, frozen=True):
    """A process. The start time distinguishes it from a later process with the same pid."""

    pid: int
    start: int  # clock ticks since boot

    @staticmethod
    def of(pid: int) -> Process | None:
        """The running process with this pid; None if there is none or it is a zombie."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else Process(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def open(self) -> int:
        """A pidfd of this process. Raises ProcessLookupError if it has ended."""
        pidfd = os.pidfd_open(self.pid)
        if not self.alive:  # the pid may belong to another process by now
            os.close(pidfd)
            raise ProcessLookupError(f"process {self.pid} has ended")
        return pidfd


def pid_namespace() -> str:
    """Ten hexadecimal digits for what pids of this process are valid in: its namespace of pids, of
    this boot of this machine. Directories that several machines share may hold names with them.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    number = os.stat("/proc/self/ns/pid").st_ino
    return hashlib.sha256(f"{boot}{number}".encode()).hexdigest()[:10]


def owned_prefix(pid: int) -> str:
    """The prefix of the names of all directories and regions of process `pid`. Containers and
    machines may share /dev/shm or /tmp without seeing each other's pids.
    """
    return f"gllm-{pid_namespace()}-{pid}-"


def remove_orphans(place: Path) -> None:
    """Remove from `place` what processes of this user have left that have ended without removing
    it; see owned_prefix.
    """
    for path in place.glob(f"gllm-{pid_namespace()}-*-*"):
        pid = path.name.split("-")[2]
        ended = False
        with contextlib.suppress(OSError):  # the kernel may hide another user's process
            ended = pid.isdecimal() and Process.of(int(pid)) is None
        if ended:
            discard(path)


def discard(path: Path) -> None:
    """Remove a file or directory of this user; those of other users stay."""
    try:
        mine = path.lstat().st_uid == os.getuid()
    except FileNotFoundError:
        return
    if mine and path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif mine:
        path.unlink(missing_ok=True)


def end_with(owner: Process | None, last: Callable[[], None] = lambda: None) -> None:
    """Call `last` and end this process as soon as `owner` has ended, whatever this process does.

    A separate thread watches, because all other threads may be waiting for the dead process. If
    the owner is the parent, its end also wakes a process that is stopped.
    """
    # It comes when the thread that has started this process ends, too: that does no harm.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)

    def end() -> NoReturn:
        last()
        os._exit(1)

    def watch(pidfd: int) -> NoReturn:
        wait_end(pidfd, None)
        end()

    if owner is None:
        end()
    try:
        pidfd = os.pidfd_open(owner.pid)
    except ProcessLookupError:
        end()
    threading.Thread(target=watch, args=(pidfd,), name="owner-watch", daemon=True).start()


def end_with_any_thread() -> None:
    """From now on, end this process when an exception ends one of its threads.

    Other processes notice the death of a process, but not the loss of a thread in it.
    """

    def end(ended: threading.ExceptHookArgs) -> None:
        threading.__excepthook__(ended)
        if ended.exc_type is not SystemExit:
            os._exit(1)

    threading.excepthook = end


def end_with_parent() -> None:
    """End this process, such as a front end, as soon as its parent has ended."""
    end_with(Process.of(os.getppid()))


def wait_end(pidfd: int, timeout_s: float | None) -> bool:
    """Whether the process ends within `timeout_s` seconds; None waits without limit."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def kill(pidfd: int) -> bool:
    """Kill the process; returns whether it has ended within KILLED_S."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    return wait_end(pidfd, KILLED_S)


def stop(pidfd: int, patience_s: float) -> bool:
    """Send SIGTERM, then SIGKILL after `patience_s` seconds; returns whether the process ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    return wait_end(pidfd, patience_s) or kill(pidfd)
