"""Measures how a served model reacts to faults: scripts/bench faults.

Each fault gets a new server on a tiny model, with CPU ranks and open streams. The fault kills or
stops one process, or exhausts a resource. The figures are: the outcomes at the clients, the seconds
to the last error, the seconds until requests are answered again, and what is left after the server
was told to stop. The benchmark needs root for mount namespaces, because each server gets its own
/dev/shm and temporary directory, which some faults fill.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from gllm_benchmarks.record import Figures, make_parser, print_table, record
from gllm_benchmarks.served_model import MODEL, await_ready, serve_command, write_repository
from gllm_client import GenerateError, SyncClient
from gllm_client.supervisor import find_stubs
from gllm_engine import write_tiny_model

RANKS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2": {"tensor_parallel_size": 2},
    "PP2": {"pipeline_parallel_size": 2},
}
ENGINE = {"device": "cpu", "cpu_threads": 1, "num_pages": 4096, "max_model_len": 16384}
NUM_STREAMS = 4
STREAM_TOKENS = 300
MANY = 300
MANY_TOKENS = 16
FEW_FILES = 256
FRONT_ENDS = 2
SHM_BYTES = 256 << 20
DISK_BYTES = 16 << 20
STOP_S = 90.0
PATIENCE_S = 20.0  # limit for streams to end after a fault
UNDO_S = 20.0  # a fault that can be undone lasts so long at least, if requests are not answered
AGAIN_S = 60.0
STEADY_S = 3.0
STILL_S = 5.0  # a stream without a token for this long counts as hanging
_MARK = "GLLM_FAULTS_MARK"

# Keeps a mount namespace open, so that files left in it can be examined after a server's end.
_HOLD = """\
mount -t tmpfs -o size="$0" tmpfs /dev/shm && mount -t tmpfs -o size="$1" tmpfs "$2" &&
echo held && exec sleep infinity
"""


class Stream(threading.Thread):
    """Reads one response. `outcome` is set at its end, `news_at` at every token."""

    def __init__(self, address: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.num_tokens = 0
        self.news_at = time.monotonic()
        self.outcome: str | None = None
        self._client = SyncClient(address, MODEL)
        self._max_tokens = max_tokens

    def run(self) -> None:
        outcome = "cut off without an error"
        try:
            for chunk in self._client.generate(
                "Once upon", max_tokens=self._max_tokens, ignore_eos=True
            ):
                self.num_tokens += chunk.num_output_tokens
                self.news_at = time.monotonic()
            if self.num_tokens == self._max_tokens:
                outcome = "whole"
        except GenerateError as error:
            outcome = _sentence(str(error))
        self.news_at = time.monotonic()
        self._client.close()
        self.outcome = outcome

    @property
    def state(self) -> str:
        if self.outcome is not None:
            return self.outcome
        return "hangs" if time.monotonic() - self.news_at > STILL_S else "goes on"

    def close(self) -> None:
        """Cancel the request if it has not ended."""
        self._client.close()
        self.join(PATIENCE_S)


class Site:
    """A `gllm serve` on a tiny model with a /dev/shm and a temporary directory of its own.

    Use it in a with statement. `max_files`: the limit of open files of each process.
    """

    def __init__(self, engine: dict[str, Any], max_files: int | str = "unlimited") -> None:
        self._engine = ENGINE | engine
        self._max_files = max_files
        self._mark = uuid.uuid4().hex

    def __enter__(self) -> Site:
        with ExitStack() as stack:
            enter = stack.enter_context
            directory = Path(enter(tempfile.TemporaryDirectory(prefix="gf-", dir="/tmp")))
            self._log = directory / "log"
            self._tmp = directory / "t"
            self._tmp.mkdir()
            write_tiny_model(
                directory / "model",
                "Qwen3ForCausalLM",
                num_hidden_layers=4,
                max_position_embeddings=16384,
            )
            write_repository(
                directory / f"r/{MODEL}", directory / "model", FRONT_ENDS, {}, self._engine
            )
            self._holder = self._hold()
            stack.callback(self._end, self._holder)
            stack.callback(self._kill_all)
            self.process = self._start(directory / "r")
            await_ready(self.process, self._log)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def shm(self) -> Path:
        return Path(f"/proc/{self._holder.pid}/root/dev/shm")

    @property
    def tmp(self) -> Path:
        """The server's temporary directory, reached through its mount namespace."""
        return Path(f"/proc/{self._holder.pid}/root{self._tmp}")

    def processes(self) -> dict[int, str]:
        """pid -> command line of every process of this server, including orphans."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"{_MARK}={self._mark}\0".encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
            except OSError:  # the process has ended
                continue
        return found

    def pids(self, part: str) -> list[int]:
        """Pids of one of PARTS."""
        if part == "front end":
            (server,) = self.pids("tritonserver")
            return sorted(row.pid for row in find_stubs(server)[MODEL])
        sought = {"engine": " gllm_engine.engine.process ", "worker": " gllm_engine.worker "}
        pattern = sought.get(part, "bin/tritonserver ")
        return sorted(pid for pid, command in self.processes().items() if pattern in command)

    def streams(self, count: int, max_tokens: int) -> list[Stream]:
        streams = [Stream(self.address, max_tokens) for _ in range(count)]
        for stream in streams:
            stream.start()
        return streams

    def answers(self) -> bool:
        """Whether two requests per front end are answered, sent one after another."""
        with SyncClient(self.address, MODEL) as client, suppress(GenerateError):
            for _ in range(2 * FRONT_ENDS):
                client.complete("Once", max_tokens=4, ignore_eos=True, timeout=5.0)
            return True
        return False

    def stop(self) -> str:
        """Stop `gllm serve` if it still runs; returns how it ended and what it left behind."""
        told = self.process.poll() is None
        if told:
            self.process.terminate()
        try:
            status = str(self.process.wait(STOP_S))
        except subprocess.TimeoutExpired:
            status = f"still there after {STOP_S:g} s"
        left = [f"process {_program(command)}" for command in self.processes().values()]
        left += [f"/dev/shm/{_name(path)}" for path in self.shm.iterdir() if path.name != "filled"]
        for path in self.tmp.iterdir():
            if path.name != "filled" and (not path.is_dir() or any(path.iterdir())):
                left.append(f"$TMPDIR/{_name(path)}")
        counted = [f"{n} x {what}" if n > 1 else what for what, n in Counter(left).items()]
        ended = "stops with" if told else "has ended with"
        return f"{ended} status {status}; left: {', '.join(counted) or 'nothing'}"

    def _hold(self) -> subprocess.Popen[str]:
        command = ["unshare", "--mount", "sh", "-c", _HOLD]
        command += [str(SHM_BYTES), str(DISK_BYTES), str(self._tmp)]
        holder = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert holder.stdout is not None
        told = holder.stdout.readline()
        if told != "held\n":
            raise SystemExit(f"no mount namespace can be made here: {told}")
        return holder

    def _start(self, repository: Path) -> subprocess.Popen[bytes]:
        raised = 'test "$0" = unlimited || ulimit -n "$0"; exec "$@"'
        serve, addresses = serve_command(repository)
        self.address = addresses.grpc
        command = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "sh", "-c"]
        command += [raised, str(self._max_files), *serve, "--exit-timeout-s=10"]
        environment = os.environ | {_MARK: self._mark, "TMPDIR": str(self._tmp)}
        with self._log.open("wb") as log:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

    def _kill_all(self) -> None:
        for pid in self.processes():
            _signal(pid, signal.SIGKILL)
        self.process.communicate()

    @staticmethod
    def _end(holder: subprocess.Popen[str]) -> None:
        holder.kill()
        holder.communicate()


Undo = Callable[[], None]
Fault = Callable[[Site], Undo | None]


def _kill(part: str) -> Fault:
    return lambda site: _signal(site.pids(part)[-1], signal.SIGKILL)


def _stop(part: str) -> Fault:
    def fault(site: Site) -> Undo:
        pid = site.pids(part)[-1]
        _signal(pid, signal.SIGSTOP)
        return lambda: _signal(pid, signal.SIGCONT)

    return fault


def _fill(place: str) -> Fault:
    def fault(site: Site) -> Undo:
        directory: Path = getattr(site, place)
        with (directory / "filled").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(1 << 20)):
                    continue
            except OSError:  # the file system is full
                return (directory / "filled").unlink

    return fault


def _kill_engine_on_a_full_disk(site: Site) -> Undo | None:
    undo = _fill("tmp")(site)
    _kill("engine")(site)
    return undo


PARTS = ("engine", "worker", "front end", "tritonserver")
FAULTS: dict[str, Fault] = {
    f"{part} {done}": fault(part)
    for part in PARTS
    for done, fault in (("killed", _kill), ("stopped", _stop))
} | {
    "/dev/shm full": _fill("shm"),
    "disk full": _fill("tmp"),
    "disk full, engine killed": _kill_engine_on_a_full_disk,
}
CROWD = f"{MANY} streams, {FEW_FILES} files a process"


def cases() -> list[tuple[str, str]]:
    """(fault, ranks) in the order of the table. An engine with one rank has no worker."""
    return [
        (fault, ranks)
        for fault in (*FAULTS, CROWD)
        for ranks in RANKS
        if not (fault.startswith("worker") and ranks == "one rank")
    ]


class Probe(threading.Thread):
    """Sends requests to a server repeatedly.

    `failing`: whether the last round of requests failed. `since`: the time of its last change.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(daemon=True)
        self.failing = False
        self.failed = False
        self.since = time.monotonic()
        self._asked = self.since  # end of the last round of requests
        self._site = site
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            failing = not self._site.answers()
            if failing != self.failing:
                self.failing = failing
                self.since = time.monotonic()
                self.failed = True
            self._asked = time.monotonic()

    @property
    def is_steady(self) -> bool:
        """Whether requests have been answered for STEADY_S; some faults show after a moment."""
        return not self.failing and self._asked - self.since > STEADY_S

    def close(self) -> None:
        self._ended.set()
        self.join()


def observe(fault: str, ranks: str) -> Figures:
    """Cause one fault and observe it. Seconds are None if the event did not happen in time."""
    crowded = fault == CROWD
    with Site(RANKS[ranks], FEW_FILES if crowded else "unlimited") as site:
        if not site.answers():
            raise SystemExit("the server does not answer although it is ready")
        streams = site.streams(*((MANY, MANY_TOKENS) if crowded else (NUM_STREAMS, STREAM_TOKENS)))
        if not crowded:
            _await(lambda: all(s.num_tokens or s.outcome for s in streams), PATIENCE_S)
        began = time.monotonic()
        undo = None if crowded else FAULTS[fault](site)
        probe = Probe(site)
        probe.start()

        def is_settled() -> bool:
            return site.process.poll() is not None or probe.is_steady

        _await(lambda: all(stream.outcome for stream in streams), PATIENCE_S)
        seen = {"clients": _states(streams), "error_s": _last_error(streams, began)}
        hung = [stream for stream in streams if stream.outcome is None]
        lasts = False
        if undo is not None:  # the server may heal itself
            _await(is_settled, UNDO_S)
            lasts = probe.failing
            undo()
            if lasts:
                began = time.monotonic()
        _await(is_settled, AGAIN_S)
        if hung and undo is not None:
            _await(lambda: all(stream.outcome for stream in hung), PATIENCE_S)
            seen["clients"] += f"; once that is undone {_states(hung)}"
        for stream in streams:
            stream.close()
        probe.close()
        is_served = probe.is_steady and site.process.poll() is None
        again_s = (probe.since - began if probe.failed else 0.0) if is_served else None
        return seen | {"again_s": again_s, "refuses_until_undone": lasts, "end": site.stop()}


def _last_error(streams: list[Stream], began: float) -> float | None:
    """Seconds until all streams had ended; None if one has not, or if none ended with an error."""
    if not all(stream.outcome for stream in streams):
        return None
    return max((s.news_at - began for s in streams if s.outcome != "whole"), default=None)


def _states(streams: list[Stream]) -> str:
    counts = Counter(stream.state for stream in streams)
    return "; ".join(f"{count} x {state}" for state, count in counts.most_common(3))


def _await(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _sentence(error: str) -> str:
    """The first sentence of an error, without parts that differ from run to run."""
    text = re.sub(r"/\S*/gf-\S+", "DIRECTORY", error.strip().splitlines()[0])
    return re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", text)[:200]


def _program(command: str) -> str:
    words = command.split()
    return words[words.index("-m") + 1] if "-m" in words else Path(words[0]).name


def _name(path: Path) -> str:
    return re.sub(r"\d+", "N", path.name)


def rows(figures: dict[str, Figures]) -> list[list[str]]:
    """The rows of the table, one per case. `figures`: "fault, ranks" -> figures."""

    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.1f} s"

    table = []
    for name, seen in figures.items():
        again = seconds(seen["again_s"]) or f"not in {AGAIN_S:g} s"
        if seen["again_s"] == 0.0:
            again = "not interrupted"
        if seen["refuses_until_undone"]:
            again += " after it is undone"
        table.append([name, seen["clients"], seconds(seen["error_s"]), again, seen["end"]])
    return table


HEADER = ["fault", "what clients saw", "last error after", "served again after", "gllm serve"]


def main() -> None:
    parser = make_parser("faults", __doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name has it")
    options = parser.parse_args()
    figures = {}
    for fault, ranks in cases():
        name = f"{fault}, {ranks}"
        if options.only in name:
            figures[name] = observe(fault, ranks)
            print(json.dumps({name: figures[name]}), file=sys.stderr, flush=True)
            # Case by case, so that an interrupted run loses nothing.
            record(options, "faults", figures, show=False)
    if not figures:
        parser.error(f"--only: no case has {options.only!r} in its name")
    print_table("Faults", HEADER, rows(figures))
    record(options, "faults", figures)


if __name__ == "__main__":
    main()
