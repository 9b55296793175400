"""A real `gllm serve` process for tests: started as a user starts it, watched, always ended.

Owns ports, the log and the waits. Every wait is for a condition, with a limit that only a broken
server reaches. Knows nothing of what is asked of the server.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from patience import WAIT_S

from gllm_client import HttpClient, SyncClient, read_metrics
from gllm_client.supervisor import ProcessRow, descendants, find_stubs, process_table

SHIPPED = Path(__file__).parents[2] / "model_repository"
MODEL = "shakespeare"
STOP_S = 60.0
QUIET_S = 0.35  # without news on /metrics, which front ends write every 0.1 s
LOG_TAIL = 20_000  # characters shown of a failed test's server
T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, timeout_s: float = WAIT_S) -> T:
    """Poll until `condition()` is true and return its value; AssertionError naming `what`."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}; last seen: {value!r}"
        time.sleep(0.02)
    return value


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Server:
    """`gllm serve REPOSITORY FLAGS` on free loopback ports; all it says goes to one log file.

    `wait_ready` before use; `stop` at the end, whatever happened.
    """

    def __init__(self, repository: Path, *flags: str, log: Path) -> None:
        http, grpc, metrics = free_ports(3)
        self.http, self.grpc = f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        self.metrics_address = f"127.0.0.1:{metrics}"
        self.log_path = log
        command = [sys.executable, "-m", "gllm_client", "serve", str(repository)]
        ports = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, *ports, *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self.process.pid  # of `gllm serve`; tritonserver is its child

    def wait_ready(self, timeout_s: float = WAIT_S) -> Server:
        """Return once all models are served; raises AssertionError with the log otherwise."""
        end = time.monotonic() + timeout_s
        while "\nready: " not in "\n" + self.log():
            status = self.process.poll()
            assert status is None, f"gllm serve ended with status {status}:\n{self.tail()}"
            assert time.monotonic() < end, f"not ready after {timeout_s:g} s:\n{self.tail()}"
            time.sleep(0.05)
        return self

    def log(self, start: int = 0) -> str:
        """What the server has said, from byte `start` on."""
        with self.log_path.open("rb") as file:
            file.seek(start)
            return file.read().decode("utf-8", "replace")

    def log_size(self) -> int:
        return self.log_path.stat().st_size

    def tail(self, start: int = 0) -> str:
        return self.log(start)[-LOG_TAIL:]

    @property
    def triton_pid(self) -> int:
        """The process id of tritonserver itself."""
        (child,) = [row for row in descendants(self.pid) if row.parent == self.pid]
        return child.pid

    def family(self) -> set[ProcessRow]:
        """Every process under `gllm serve`: tritonserver, its stubs, the engines."""
        return descendants(self.pid)

    def stubs(self) -> dict[str, set[ProcessRow]]:
        """The front ends that live, by model."""
        return find_stubs(self.triton_pid)

    def address(self, scheme: str) -> str:
        """host:port by scheme, grpc or http."""
        return {"grpc": self.grpc, "http": self.http}[scheme]

    def client(self, model: str = MODEL, *, with_status: bool = False) -> SyncClient:
        """A blocking gRPC client; close it, or use it in a with statement."""
        return SyncClient(self.grpc, model, with_status=with_status)

    def http_client(self, model: str = MODEL) -> HttpClient:
        return HttpClient(self.http, model)

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name with labels, e.g. 'gllm:kv_cache_usage{model="m",...}'."""
        return read_metrics(self.metrics_address, timeout=WAIT_S)

    def metric(self, name: str, model: str = MODEL, **labels: str) -> float:
        """The sum of one metric's samples of a model, over other labels unless given; 0 if none.

        `name`: without "gllm:".
        """
        wanted = [f'{key}="{value}"' for key, value in ({"model": model} | labels).items()]
        return sum(
            value
            for sample, value in self.metrics().items()
            if sample.startswith(f"gllm:{name}{{") and all(each in sample for each in wanted)
        )

    def is_idle(self, model: str = MODEL) -> bool:
        """No sequence runs or waits, and none holds a page."""
        gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage")
        return not any(self.metric(gauge, model) for gauge in gauges)

    def wait_idle(self, model: str = MODEL, timeout_s: float = WAIT_S) -> None:
        wait_for(lambda: self.is_idle(model), f"{model} is idle again", timeout_s)

    def settle(self, model: str = MODEL) -> None:
        """Wait until a model is idle and what it did is on /metrics, which follows after 0.1 s."""
        self.wait_idle(model)
        before, since, end = {}, time.monotonic(), time.monotonic() + WAIT_S
        while time.monotonic() - since < QUIET_S:
            now = {name: value for name, value in self.metrics().items() if "gllm:" in name}
            if now != before:
                before, since = now, time.monotonic()
            assert since < end, "the metrics do not come to rest"
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = STOP_S) -> int:
        """Send a signal, wait, kill what is left; the exit status of `gllm serve`. Idempotent."""
        family = self.family()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            for row in family & set(_still_running(family)):
                try:
                    os.kill(row.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def _still_running(family: set[ProcessRow], patience_s: float = 15.0) -> list[ProcessRow]:
    """Those of `family` that have not ended by themselves after a while."""
    end = time.monotonic() + patience_s
    while True:
        rows = process_table()
        left = [row for row in family if row.pid in rows and rows[row.pid].start == row.start]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.05)
