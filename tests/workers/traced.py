"""What groups of workers leave behind: processes by a mark in their environment, and files.

Like the server tests' traces, for tests that start no server. Every wait has a limit that only
something broken reaches.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

# As patience.py's, which processes that run these files do not find.
WAIT_S = 180.0
SOON_S = 15.0
MARK = "GLLM_DIST_TEST_MARK"
T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, timeout_s: float = WAIT_S) -> T:
    """Poll until `condition()` is true and return its value; AssertionError naming `what`."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
    return value


class Traces:
    """Processes started while it is in force, and their temporary directory."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        # Short: the paths of sockets in it hold 107 bytes at most.
        self.directory = Path(tempfile.mkdtemp(prefix="gt-", dir="/tmp"))

    def processes(self) -> dict[int, str]:
        """Those that run, by pid: their commands."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}\0".encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        return found

    def workers(self) -> list[int]:
        return [pid for pid, command in self.processes().items() if "gllm_engine.worker" in command]

    def directories(self) -> list[Path]:
        found = glob.glob(f"{self.directory}/**/gllm-*-*-*", recursive=True)
        return [Path(path) for path in found]

    def wait_gone(self, timeout_s: float = SOON_S) -> None:
        wait_for(lambda: not self.workers(), "the workers have ended", timeout_s)
        wait_for(lambda: not self.directories(), "their directory is gone", timeout_s)


@contextlib.contextmanager
def traced() -> Iterator[Traces]:
    """In force in the block; whatever is left at its end is killed."""
    traces = Traces()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(MARK, traces.mark)
        environment.setenv("TMPDIR", str(traces.directory))
        environment.setattr(tempfile, "tempdir", None)
        yield traces
    for pid in traces.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(traces.directory, ignore_errors=True)
