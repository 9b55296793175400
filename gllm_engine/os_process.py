"""Processes of this machine: telling them apart, waiting for their end, ending with them.

Knows pids; nothing of what a process does.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec


class Process(msgspec.Struct, frozen=True):
    """A process, told apart from a later one with the same pid by its start time."""

    pid: int
    start: int  # clock ticks since boot

    @staticmethod
    def of(pid: int) -> Process | None:
        """The running process with this pid; None when there is none or only a zombie."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else Process(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        return Process.of(self.pid) == self


def end_with(owner: Process | None, last: Callable[[], None] = lambda: None) -> None:
    """End this process, whatever it is doing, as soon as `owner` has ended; after calling `last`.

    By a thread of its own, which alone can end a process whose other threads wait for the dead.
    """

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
    """From now on a thread that ends by an exception ends this process: its death is noticed by
    others, a thread's that it has silently lost is not.
    """

    def end(ended: threading.ExceptHookArgs) -> None:
        threading.__excepthook__(ended)
        if ended.exc_type is not SystemExit:
            os._exit(1)

    threading.excepthook = end


def end_with_parent() -> None:
    """For a front end: end this process as soon as its parent, tritonserver, has ended."""
    end_with(Process.of(os.getppid()))


def wait_end(pidfd: int, timeout_s: float | None) -> bool:
    """Wait at most `timeout_s` seconds, or for ever if None: whether the process has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))
