"""`gllm serve`: starts tritonserver, loads the models, replaces dead stubs, stops and cleans up.

Owns the server process, and the removal of all its processes and files at the end. tritonserver
never restarts a stub (a front end's process) that died: requests to it hang while the model stays
READY. Unloading and loading the model starts new stubs, so the supervisor does that when a stub is
missing or stopped. The engine goes on meanwhile, and so do the other front ends' streams.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import gllm_engine
from gllm_client.client import SyncClient
from gllm_client.http import read_metrics
from gllm_client.protocol import GenerateError
from gllm_client.signals import Signals, caught_signals
from gllm_client.tritonserver import (
    SHM,
    STUB,
    ServerError,
    Serving,
    assemble_backends,
    find_server,
    make_directory,
    server_arguments,
    server_environment,
    sweep,
)
from gllm_engine import discard, owned_prefix

PORTS = ("http", "grpc", "metrics")
TICK_S = 0.1  # between two looks at what is awaited
WATCH_S = 0.5  # between two looks at the stubs; the next one confirms that a stub is missing
# A look at all processes of the machine takes milliseconds. This is the longest time between two
# for which nothing changes.
CALM_S = 8.0
LOAD_TRIES = 3
ENGINES_S = 5.0  # between two reads of the metrics for engines that fail to restart
MAX_FAILED_STARTS = 5  # consecutive failed restarts of an engine; the cause is then permanent
KILL_AFTER_S = 5.0  # on top of the server's own exit timeout

# The child runs this and becomes the server. The kernel kills it when `gllm serve` ends in any way.
_EXEC = """
import ctypes, os, sys
parent, *command = sys.argv[1:]
PR_SET_PDEATHSIG, SIGKILL = 1, 9
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""


_FAILED_STARTS = re.compile(r'gllm:engine_failed_starts\{.*\bmodel="(?P<model>[^"]*)"')


def serve(serving: Serving) -> int:
    """Serve until SIGTERM, SIGINT or the server's end; returns the exit status."""
    check_ports(serving)
    installation = find_server()
    sweep()
    directory = make_directory()
    prefix = owned_prefix(os.getpid())
    try:
        for name in ("backends", "models"):
            (directory / name).mkdir()
        assemble_backends(installation, directory / "backends")
        repository, models = prepare_repository(serving, directory / "models")
        given = server_flags(serving, repository)
        arguments = server_arguments(directory / "backends", prefix, given)
        environment = server_environment(installation)
        with caught_signals() as signals:
            server = Server([str(installation.binary), *arguments], environment)
            return Supervisor(server, serving, models, signals).run()
    finally:
        discard(directory)
        for region in SHM.glob(f"{prefix}*"):
            discard(region)
        sweep_engines()


def sweep_engines() -> None:
    """Remove what engines and front ends leave that were killed while they started."""
    try:
        gllm_engine.sweep()
    except (OSError, gllm_engine.EngineError) as error:
        _log(f"private directories of engines may be left: {error}")


def server_flags(serving: Serving, repository: Path) -> list[str]:
    """tritonserver's flags. Raises ServerError if the user gives a flag that gllm serve sets."""
    ours = {
        "--model-repository": repository,
        "--model-control-mode": "explicit",
        "--exit-timeout-secs": serving.exit_timeout_s,
        **{f"--{kind}-address": serving.host for kind in PORTS},
        **{f"--{kind}-port": getattr(serving, f"{kind}_port") for kind in PORTS},
    }
    for argument in serving.arguments:
        name = argument.partition("=")[0]
        if name in ours:
            raise ServerError(f"{name} is set by gllm serve, it cannot be given after --")
    return [*(f"{name}={value}" for name, value in ours.items()), *serving.arguments]


def check_ports(serving: Serving) -> None:
    """Raise ServerError for a port that is in use, given twice or not allowed for this user."""
    seen: dict[int, str] = {}
    for kind in (*PORTS, "openai"):
        port = getattr(serving, f"{kind}_port")
        if port is None:
            continue
        if port in seen:
            raise ServerError(f"port {port} is given for both {seen[port]} and {kind}")
        seen[port] = kind
        family = socket.AF_INET6 if ":" in serving.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((serving.host, port))
                probe.listen()
            except OSError as error:
                reason = "is in use" if error.errno == 98 else f"cannot be used ({error.strerror})"
                raise ServerError(
                    f"port {port} on {serving.host} {reason}; choose another with --{kind}-port"
                ) from None


def openai_command(serving: Serving, host: str) -> list[str]:
    """The command of the OpenAI server; `host`: at which the server's own ports answer."""
    options = serving.openai | {
        "url": f"grpc://{host}:{serving.grpc_port}",
        "host": serving.host,
        "port": serving.openai_port,
        "metrics_url": f"http://{host}:{serving.metrics_port}/metrics",
        "drain_timeout_s": serving.exit_timeout_s,
    }
    flags = []
    for name, value in options.items():
        for one in value if isinstance(value, tuple) else (value,):
            flags.append(f"--{name.replace('_', '-')}={one}")
    return [sys.executable, "-Im", "gllm_client", "openai", *flags]


def prepare_repository(serving: Serving, directory: Path) -> tuple[Path, list[str]]:
    """The model repository to serve, and the names of its models.

    For a checkpoint or a single model, makes a repository in `directory`. Raises ServerError if
    `path` is neither of these nor a repository.
    """
    path = serving.path.resolve()
    if (path / "config.json").is_file():
        name = serving.name or path.name
        write_model(directory / name, {"model": str(path)} | serving.engine, serving.front_ends)
        return directory, [name]
    if serving.engine or serving.name or serving.front_ends != 1:
        raise ServerError(
            f"{serving.path} is not a checkpoint (it has no config.json); engine options, --name "
            "and --front-ends are for one. Those of a repository are in its model.json and "
            "config.pbtxt"
        )
    if (path / "config.pbtxt").is_file():
        (directory / path.name).symlink_to(path)
        return directory, [path.name]
    models = sorted(config.parent.name for config in path.glob("*/config.pbtxt"))
    if not models:
        raise ServerError(
            f"{serving.path} is neither a checkpoint (config.json) nor a model repository "
            "(NAME/config.pbtxt)"
        )
    return path, models


def write_model(directory: Path, engine: dict[str, Any], front_ends: int) -> None:
    """Write a model of the gllm backend: config.pbtxt and 1/model.json."""
    if not re.fullmatch(r"[\w.-]+", directory.name):
        raise ServerError(
            f"{directory.name!r} cannot be a model's name (letters, digits, '_', '-' and '.'); "
            "give one with --name"
        )
    (directory / "1").mkdir(parents=True)
    (directory / "1/model.json").write_text(json.dumps(engine, indent=2))
    (directory / "config.pbtxt").write_text(
        'backend: "gllm"\n'
        "max_batch_size: 0\n"
        f"instance_group [{{ count: {front_ends} kind: KIND_MODEL }}]\n"
    )


def is_listening(host: str, port: int) -> bool:
    """Whether connections to a port are accepted."""
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


class ProcessRow(NamedTuple):
    """A running process. `start` (clock ticks since boot) tells it from a later one of its pid."""

    pid: int
    parent: int
    start: int


def process_table() -> dict[int, ProcessRow]:
    """All running processes by pid, without zombies."""
    rows = {}
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        found = _read_row(pid)
        if found is not None and found[0] not in "ZX":
            rows[pid] = found[1]
    return rows


def _read_row(pid: int) -> tuple[str, ProcessRow] | None:
    """The state of a process, one letter, and its row; None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent, *rest = stat.rpartition(")")[2].split()
    return state, ProcessRow(pid, int(parent), int(rest[17]))


def descendants(pid: int) -> set[ProcessRow]:
    """All descendants of a process."""
    rows = process_table().values()
    found: set[ProcessRow] = set()
    ancestors = {pid}
    while ancestors:
        children = {row for row in rows if row.parent in ancestors} - found
        found |= children
        ancestors = {row.pid for row in children}
    return found


def find_stubs(server_pid: int) -> dict[str, set[ProcessRow]]:
    """The running stubs of a server, by model.

    A stub is a child of the server; its first argument is <repository>/<model>/<version>/model.py.
    """
    stubs: dict[str, set[ProcessRow]] = {}
    for row in process_table().values():
        if row.parent != server_pid:
            continue
        try:
            command = Path(f"/proc/{row.pid}/cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        model = Path(command[1]).parts[-3:-2] if len(command) > 1 else ()
        if model and Path(command[0]).name == STUB:
            stubs.setdefault(model[0], set()).add(row)
    return stubs


def is_stopped(row: ProcessRow) -> bool:
    """Whether a process is stopped by a signal or a debugger."""
    return _state(row) in tuple("Tt")


def is_serving(row: ProcessRow) -> bool:
    """Whether a process is there and not stopped."""
    return _state(row) not in (None, *"TtZX")


def _state(row: ProcessRow) -> str | None:
    """A letter, see proc(5); None if the process has ended."""
    found = _read_row(row.pid)
    return found[0] if found is not None and found[1].start == row.start else None


class Server:
    """A tritonserver process that ends with this process. Its output goes to our stderr."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        wrapped = [sys.executable, "-ISc", _EXEC, str(os.getpid()), *command]
        # A new session: Ctrl-C at the terminal signals only this process, which stops the server.
        self._process = subprocess.Popen(
            wrapped,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            start_new_session=True,
        )
        self.pid = self._process.pid
        # Processes that must have ended at the end. After the server's death, its orphans can no
        # longer be found by their parent.
        self.family: set[ProcessRow] = set()
        self._look_again = 0.0
        self._pause = WATCH_S  # until the next look

    def poll(self) -> int | None:
        """The exit status once the server has ended, else None; 128 + n after signal n.

        Must be called often: it also looks at the server's descendants, the more rarely the longer
        they stay the same.
        """
        if time.monotonic() > self._look_again:
            self.look()
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def look(self) -> None:
        """Record the server's descendants. Call it when new ones are known to be there."""
        family = descendants(self.pid) or self.family
        self._pause = min(2 * self._pause, CALM_S) if family == self.family else WATCH_S
        self.family = family
        self._look_again = time.monotonic() + self._pause

    def stop(self, timeout_s: float, impatient: Callable[[], bool]) -> bool:
        """End the server and its descendants. Returns whether it ended without SIGKILL.

        Sends SIGTERM, then SIGKILL after `timeout_s` seconds or as soon as `impatient()` is true.
        """
        family = self.family | descendants(self.pid)
        graceful = True
        if self.poll() is None:
            self._process.terminate()
            end = time.monotonic() + timeout_s
            while self.poll() is None and time.monotonic() < end and not impatient():
                family |= descendants(self.pid)
                time.sleep(TICK_S)
            if self.poll() is None:
                graceful = False
                self._process.kill()
                self._process.wait()
        _outlive(family)
        return graceful


def _outlive(family: set[ProcessRow], patience_s: float = 3.0) -> None:
    """Wait for orphaned engines and stubs to end by themselves, then kill the rest."""
    end = time.monotonic() + patience_s
    while left := _still_there(family):
        if time.monotonic() > end:
            for row in left:
                _kill(row)
            end += patience_s
        time.sleep(TICK_S / 2)


def _kill(row: ProcessRow) -> None:
    try:
        os.kill(row.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _still_there(family: set[ProcessRow]) -> list[ProcessRow]:
    rows = process_table()
    return [row for row in family if row.pid in rows and rows[row.pid].start == row.start]


class Stopped(Exception):
    """A signal requested the end."""


class Exited(Exception):
    """The server ended by itself, with this exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Supervisor:
    """Loads the models, and reloads a model whose stub died, until the end.

    Every wait is a series of ticks. A tick ends at a signal and at the server's death.
    """

    def __init__(
        self, server: Server, serving: Serving, models: list[str], signals: Signals
    ) -> None:
        self._server = server
        self._serving = serving
        self._models = models
        self._signals = signals
        self._pidfd = os.pidfd_open(server.pid)
        self._news = select.poll()
        for news in (signals.news, self._pidfd):
            self._news.register(news, select.POLLIN)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(serving.host, serving.host)
        self._host = f"[{host}]" if ":" in host else host
        self._address = f"{self._host}:{serving.grpc_port}"
        self._client = SyncClient(self._address)
        self._openai: Server | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="gllm-serve")
        # The stubs at the last count without a missing stub; None before the first such count.
        self._settled: dict[str, set[ProcessRow]] | None = None
        self._counted: set[ProcessRow] = set()  # the server's descendants before the last count
        # Stubs of unloaded models. A request lost with its stub never ends for the server, so the
        # other stubs of that load live as long as the server. They get no new requests.
        self._retired: set[ProcessRow] = set()

    def run(self) -> int:
        """Serve until the end; returns the exit status of `gllm serve`."""
        status = 1
        problem = ""
        try:
            self._bring_up()
            self._watch()
        except Stopped:
            status = 0
        except Exited as exited:
            status = exited.status or 1  # an unrequested end is a failure, even with status 0
            problem = f"tritonserver ended by itself with status {exited.status}"
        except GenerateError as error:
            problem = str(error)
        finally:
            graceful = self._stop()
        if problem:  # logged last, after the server's own log
            _log(problem)
        return status if graceful else status or 1

    def _stop(self) -> bool:
        before = self._signals.count
        timeout_s = self._serving.exit_timeout_s + KILL_AFTER_S
        if self._openai is not None:  # first, because its answers come from the server
            self._openai.stop(timeout_s, lambda: self._signals.count > before)
        graceful = self._server.stop(timeout_s, lambda: self._signals.count > before)
        self._client.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        os.close(self._pidfd)
        if not graceful:
            _log("tritonserver was killed before it had stopped")
        return graceful

    def _bring_up(self) -> None:
        while not self._client.is_live(timeout=1.0):
            self._tick()
            self._client.close()  # a refused client would wait seconds before its next attempt
            self._client = SyncClient(self._address)
        for model in self._models:
            self._load(model)
        at = self._serving
        openai = ""
        if at.openai_port is not None:
            self._start_openai()
            while not is_listening(self._host.strip("[]"), at.openai_port):
                if self._openai is not None and self._openai.poll() is not None:
                    raise GenerateError("the OpenAI server cannot start, for reasons given above")
                self._tick()
            scheme = "https" if at.openai.get("tls_key") else "http"
            openai = f" openai {scheme}://{self._host}:{at.openai_port}/v1"
        print(
            f"ready: {', '.join(self._models)} at http://{self._host}:{at.http_port} "
            f"grpc://{self._host}:{at.grpc_port} "
            f"metrics http://{self._host}:{at.metrics_port}/metrics{openai}",
            flush=True,
        )

    def _start_openai(self) -> None:
        self._openai = Server(openai_command(self._serving, self._host), dict(os.environ))

    def _look_at_openai(self) -> None:
        """Start the OpenAI server anew if it has ended."""
        status = self._openai and self._openai.poll()
        if status is not None:
            _log(f"the OpenAI server ended by itself with status {status}; starting it anew")
            self._pause(WATCH_S)
            self._start_openai()

    def _load(self, model: str) -> None:
        try:
            self._await(self._client.load, model)
            self._server.look()
        except GenerateError as error:
            reason = str(error).partition("\n\nAt:")[0].strip().rstrip(";")  # no Python stack
            raise GenerateError(f"model {model} cannot be loaded: {reason}") from None

    def _watch(self) -> None:
        suspects: set[str] = set()
        look_at_engines = time.monotonic() + ENGINES_S
        while True:
            self._pause(WATCH_S)
            self._look_at_openai()
            if time.monotonic() > look_at_engines:
                self._look_at_engines()
                look_at_engines = time.monotonic() + ENGINES_S
            if self._is_intact():
                suspects = set()
                continue
            self._counted = self._server.family
            stubs = self._stubs()
            if stubs == self._settled:
                suspects = set()
                continue
            try:
                missing = self._missing(stubs)
            except GenerateError:  # a model was loaded or unloaded during the check
                continue
            for model in sorted(missing & suspects):
                self._recover(model)
            suspects = missing - suspects
            if not missing:
                self._settled = stubs

    def _is_intact(self) -> bool:
        """Whether all stubs of the last count serve, and no other processes have come: those of a
        model that somebody else has loaded.
        """
        if self._settled is None or self._server.family != self._counted:
            return False
        return all(is_serving(stub) for stubs in self._settled.values() for stub in stubs)

    def _stubs(self) -> dict[str, set[ProcessRow]]:
        """The stubs that serve, by model; a stopped one does not."""
        found = find_stubs(self._server.pid)
        serving = {
            model: set(filter(is_serving, stubs - self._retired)) for model, stubs in found.items()
        }
        return {model: stubs for model, stubs in serving.items() if stubs}

    def _kill_stopped(self, model: str) -> None:
        """Kill the stopped stubs of a model.

        tritonserver 2.51 has crashed when a stub went on after requests to it were given up.
        """
        for stub in find_stubs(self._server.pid).get(model, set()):
            if is_stopped(stub):
                _log(f"a front end of model {model} is stopped; it is killed")
                _kill(stub)

    def _missing(self, stubs: dict[str, set[ProcessRow]]) -> set[str]:
        """The READY models with fewer stubs than configured instances."""
        ready = [e["name"] for e in self._await(self._client.index) if e["state"] == "READY"]
        return {
            model
            for model in ready
            if len(stubs.get(model, ())) < self._await(self._client.num_stubs, model)
        }

    def _look_at_engines(self) -> None:
        """Raise GenerateError for a model whose lost engine cannot be started again."""
        address = f"{self._host}:{self._serving.metrics_port}"
        try:
            metrics = self._await(read_metrics, address)
        except GenerateError:  # the metrics page may be switched off
            return
        for sample, count in metrics.items():
            failing = _FAILED_STARTS.match(sample)
            if failing and count >= MAX_FAILED_STARTS:
                raise GenerateError(
                    f"model {failing['model']} has lost its engine, and {count:.0f} attempts to "
                    "start another have failed, for reasons given above"
                )

    def _recover(self, model: str) -> None:
        """Unload and load a model: the only way to make tritonserver start a new stub."""
        _log(f"a front end of model {model} died; loading the model anew")
        began = time.monotonic()
        self._kill_stopped(model)
        self._retired |= self._stubs().get(model, set())
        for left in reversed(range(LOAD_TRIES)):
            try:
                self._await(self._client.unload, model)
                self._load(model)
                break
            except GenerateError as error:
                if not left:
                    raise
                _log(f"{error}; trying again")
                self._pause(1.0)
        self._settled = None
        _log(f"model {model} is back after {time.monotonic() - began:.1f} s")

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._tick(left)

    def _await(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a blocking call to the server on the extra thread, with ticks meanwhile."""
        future: Future[Any] = self._threads.submit(function, *arguments)
        while not future.done():
            self._tick()
        self._check()
        return future.result()

    def _tick(self, seconds: float = TICK_S) -> None:
        self._check()
        self._news.poll(1000 * seconds)

    def _check(self) -> None:
        if self._signals.count:
            raise Stopped
        status = self._server.poll()
        if status is not None:
            raise Exited(status)


def _log(message: str) -> None:
    print(f"gllm serve: {message}", file=sys.stderr, flush=True)
