"""Workers without the seconds in which each would import torch: forks of one process that has.

Run as a program, this file is that process. It reads what to fork from its standard input, a JSON
object a line, and answers with the pid.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from gllm_engine.os_process import wait_end

# In the environment of a fork. A directory: encoders have odd_tower.py's tower. A file for the log.
FAULT = "GLLM_TEST_FAULTS"
LOG = "GLLM_TEST_LOG"


class Fork:
    """As much of a Popen as a group of workers uses."""

    returncode = "unknown"  # to all but its parent

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        weakref.finalize(self, os.close, self._pidfd)

    def poll(self) -> str | None:
        """None while it runs."""
        return self.returncode if wait_end(self._pidfd, 0) else None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


@contextmanager
def forked_workers() -> Iterator[None]:
    """Workers and encoders that start within are forks."""
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        stdin, stdout = parent.stdin, parent.stdout
        assert stdin is not None and stdout is not None

        def fork(
            command: list[str], cwd: Path, env: dict[str, str], stdin: int, start_new_session: bool
        ) -> Fork:
            assert command[:2] == [sys.executable, "-m"]
            assert stdin == subprocess.DEVNULL and start_new_session
            return Fork(ask(command[2:], str(cwd), env))

        def ask(arguments: list[str], cwd: str, env: dict[str, str]) -> int:
            stdin.write(json.dumps([arguments, cwd, env]).encode() + b"\n")
            stdin.flush()
            return int(stdout.readline())

        with pytest.MonkeyPatch.context() as patch:
            names = SimpleNamespace(Popen=fork, DEVNULL=subprocess.DEVNULL)
            patch.setattr("gllm_engine.workers.meeting.subprocess", names)
            yield
        stdin.close()


def serve_forks(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Returns at the end of the requests; in a fork, it does not return."""
    from gllm_engine.workers import encoder, worker

    mains = {"gllm_engine.worker": worker.main, "gllm_engine.encoder": encoder.main}
    for line in requests:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # the pids until then stay theirs
                continue
        pid = os.fork()
        if pid == 0:
            (module, *arguments), *where = json.loads(line)
            os._exit(run_worker(mains[module], arguments, *where))
        answers.write(b"%d\n" % pid)
        answers.flush()


def run_worker(main: Any, arguments: list[str], cwd: str, env: dict[str, str]) -> int:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    if LOG in env:
        os.dup2(os.open(env[LOG], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    os.dup2(2, 1)  # its own output is not an answer
    if FAULT in env:
        import odd_tower

        odd_tower.install(Path(env[FAULT]))
    return int(main(arguments))


if __name__ == "__main__":
    serve_forks(sys.stdin.buffer, sys.stdout.buffer)
