"""What a server leaves behind, and servers started in other ways than `gllm serve REPOSITORY`.

Every process started while a `Traces` is in force carries a mark in its environment, as do all
its children, orphans included; so they are found whoever their parent is. Temporary files go to a
directory of its own. Knows nothing of requests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from live import WAIT_S, Server, free_ports, wait_for
from patience import SOON_S

from gllm_client.supervisor import STUB
from gllm_client.tritonserver import SHM
from gllm_engine import owned_prefix, pid_namespace

MARK = "GLLM_TEST_MARK"
ENGINE = "gllm_engine.engine.process"


class Traces:
    """In force from `begin` to `end`: processes by mark, files by directory, regions by pid."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        # Short: the paths of sockets in it hold 107 bytes at most.
        self.directory = Path(tempfile.mkdtemp(prefix="gt-", dir="/tmp"))
        self._environment = pytest.MonkeyPatch()

    @property
    def variables(self) -> dict[str, str]:
        """What a process has in its environment while this is in force."""
        return {MARK: self.mark, "TMPDIR": str(self.directory)}

    def begin(self) -> Traces:
        for name, value in self.variables.items():
            self._environment.setenv(name, value)
        return self

    def end(self) -> None:
        self._environment.undo()
        for pid in self.processes():
            os.kill(pid, 9)
        shutil.rmtree(self.directory)

    def processes(self) -> dict[int, list[str]]:
        """The command of every running process that carries the mark, by pid."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}\0".encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_text().split("\0")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def engines(self, model: Path | None = None) -> list[int]:
        """Pids of the engine processes; of those alone that serve the checkpoint in `model`."""
        found = []
        for pid, command in self.processes().items():
            if ENGINE not in command:
                continue
            config = Path(command[command.index(ENGINE) + 1], "config.json")
            if model is None or f'"{model.resolve()}"' in config.read_text():
                found.append(pid)
        return found

    def stubs(self) -> list[int]:
        return [pid for pid, command in self.processes().items() if Path(command[0]).name == STUB]

    @property
    def private(self) -> Path:
        """The directory under which engines keep what is theirs; it may stay once it is empty."""
        return self.directory / f"gllm-{os.getuid()}-{pid_namespace()}"

    def files(self) -> list[Path]:
        """All in the temporary directory but `private` itself."""
        return [path for path in self.directory.rglob("*") if path != self.private]


def regions(pid: int, shm: Path = SHM) -> list[Path]:
    """The shared-memory regions kept for a `gllm serve` or `gllm tritonserver` of this pid."""
    return list(shm.glob(f"{owned_prefix(pid)}*"))


def wait_gone(traces: Traces) -> None:
    """No process with the mark runs any more."""
    wait_for(lambda: not traces.processes(), "every process has ended", SOON_S)


class Launched(Server):
    """A command that becomes a server, given the three ports; by default `gllm`'s.

    The ports follow its first word: what follows `--` is not for `gllm`.
    `options`: as Popen's.
    """

    def __init__(
        self,
        *command: str,
        log: Path,
        before: Sequence[str] = (),
        program: Sequence[str] = (sys.executable, "-m", "gllm_client"),
        **options: Any,
    ) -> None:
        http, grpc, metrics = free_ports(3)
        self.http, self.grpc = f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        self.metrics_address = f"127.0.0.1:{metrics}"
        self.log_path = log
        ports = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*before, *program, *command[:1], *ports, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
        self.pid = self.process.pid

    def wait_models_ready(self, *models: str) -> Launched:
        """For a plain tritonserver, which prints no line when it is ready."""
        with self.http_client() as client:

            def ready() -> bool:
                status = self.process.poll()
                assert status is None, f"ended with status {status}:\n{self.tail()}"
                return all(client.is_ready(model) for model in models)

            wait_for(ready, "the models are ready", WAIT_S)
        return self

    def wait_ended(self, timeout_s: float) -> int:
        """Its exit status; AssertionError when it does not end by itself."""
        wait_for(lambda: self.process.poll() is not None, "the command has ended", timeout_s)
        return self.process.wait()
