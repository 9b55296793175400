"""A worker: one rank of a group, run by the engine's plans.

Started by the engine on its own machine, by torchrun on others. It joins, is told what it is, loads
its share of the model and runs each plan it is sent. When the engine is lost a worker of the
engine's machine ends; one of another machine begins anew, in the same process but with nothing left
of what it was, and waits for the next engine. Knows nothing of requests.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

import torch.distributed as dist
import zmq
from msgspec.structs import replace

from gllm_engine import wire
from gllm_engine.arch import read_arch
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.os_process import Process, end_with
from gllm_engine.parallel import Mesh, RankGroups, join_ranks, talk_through
from gllm_engine.runner import Runner, RunnerStep, default_threads
from gllm_engine.types import StepPlan, StepResult
from gllm_engine.workers import channel
from gllm_engine.workers.build_runner import device_of, load_runner

_REFUSED = 78  # exit status: os.EX_CONFIG
# Before it tries again, so that one who is refused again and again is no burden.
_REFUSED_PAUSE_S = 5.0

log = logging.getLogger("gllm.worker")


def main(arguments: list[str] | None = None) -> int:
    """`python -m gllm_engine.worker`; see docs in --help."""
    options = _parser().parse_args(arguments)
    owner = Process.of(options.owner or os.getppid())
    end_with(owner, lambda: _clear_away(options.engine))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        return _Worker(options).run()
    except (ConfigError, _Refused) as error:
        log.error("%s", error)
        if not _is_local(options.engine):
            time.sleep(_REFUSED_PAUSE_S)
        return _REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun --standalone --nproc-per-node N -m gllm_engine.worker",
        description="The workers of a node that is not the engine's, one a GPU.",
    )
    parser.add_argument("--engine", required=True, help="tcp://HOST:PORT, the engine's master_addr")
    parser.add_argument("--model", required=True, help="directory of the checkpoint on this node")
    parser.add_argument("--node-rank", default="0", help="of this node, the engine's is 0")
    parser.add_argument("--nnodes", default="2", help="as the engine's")
    parser.add_argument("--cluster-key-file", help="the secret that the engine has too")
    parser.add_argument("--owner", type=int, help="pid to end with; default: the parent's")
    return parser


def _number(name: str, text: str) -> int:
    """A number of ranks or nodes. Raises ConfigError."""
    if not (text.isascii() and text.isdecimal() and len(text) < 5):
        raise ConfigError(f"{name}: {text[:60]!r} is not a whole number from 0 to 9999")
    return int(text)


def _is_local(address: str) -> bool:
    return address.startswith("ipc:")


def _clear_away(address: str) -> None:
    """An engine that was killed cannot do it: its directory, where its own workers live."""
    if _is_local(address):
        shutil.rmtree(Path(address.removeprefix("ipc://")).parent, ignore_errors=True)


class _Refused(RuntimeError):
    """The engine does not take this worker; the message says why."""


class _Worker:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._local_rank = _number("LOCAL_RANK", os.environ.get("LOCAL_RANK", "0"))
        self._local_size = _number("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
        options.node_rank = _number("--node-rank", options.node_rank)
        options.nnodes = _number("--nnodes", options.nnodes)
        self._secret = None
        if not _is_local(options.engine):
            if options.cluster_key_file is None:
                raise ConfigError("--cluster-key-file: it is needed to join another machine")
            self._secret = channel.read_secret(Path(options.cluster_key_file))
        self._context = zmq.Context()
        self._plans, self._monitor = self._connect()

    def run(self) -> int:
        assigned = self._join()
        self._rank = assigned.rank
        try:
            runner, ranks = self._load(assigned)
            self._plans.send_multipart(wire.encode(wire.Ready(runner.num_pages)))
            self._work(runner, ranks)
        except Exception as error:  # whatever a kernel, a peer or a checkpoint does
            log.exception("rank %d fails", self._rank)
            self._fail(error)
        return 1

    def _join(self) -> wire.Assigned:
        options = self._options
        # The engine sees to it that its last words are read; ours are the log's.
        threading.Thread(
            target=self._begin_anew_once_lost, name="engine-watch", daemon=True
        ).start()
        join = wire.Join(
            wire.PROTOCOL, channel.software(), channel.digest(Path(options.model)),
            options.node_rank, options.nnodes, self._local_rank, self._local_size,
        )  # fmt: skip
        self._plans.send_multipart(wire.encode(join))
        answer = self._receive()
        if isinstance(answer, wire.Refusal):
            raise _Refused(answer.message)
        return answer

    def _receive(self) -> Any:
        while True:
            message = wire.decode(self._plans.recv_multipart())
            if not isinstance(message, wire.Ping):
                return message

    def _connect(self) -> tuple[zmq.Socket[bytes], zmq.Socket[Any]]:
        return channel.connect(self._context, self._options.engine, self._secret)

    def _not_heard(self) -> None:
        address, key_file = self._options.engine, self._options.cluster_key_file
        log.warning(
            "%s breaks off the greeting: it is no engine, or its key is not the one in %s; "
            "this worker goes on trying", address, key_file
        )  # fmt: skip

    def _begin_anew_once_lost(self) -> NoReturn:
        """Whatever the other threads wait for, which may be for ever."""
        channel.await_loss(self._monitor, self._not_heard)
        if _is_local(self._options.engine):
            _clear_away(self._options.engine)
            os._exit(1)
        log.warning("the engine is lost; this worker waits for another")
        time.sleep(1)  # for who else has lost it
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2:  # libraries leave theirs open to the next program
                with contextlib.suppress(OSError):
                    os.set_inheritable(number, False)
        os.execv(sys.executable, [sys.executable, "-m", "gllm_engine.worker", *sys.argv[1:]])

    def _load(self, assigned: wire.Assigned) -> tuple[Runner, RankGroups]:
        threads = assigned.config.cpu_threads or max(1, default_threads() // self._local_size)
        config: EngineConfig = replace(
            assigned.config, model=self._options.model, cpu_threads=threads
        )
        device = device_of(config, self._local_rank)
        mesh = Mesh(config.pipeline_parallel_size, config.tensor_parallel_size)
        store: dist.Store
        if config.nnodes == 1:
            talk_through("127.0.0.1")
            store = dist.FileStore(assigned.store, mesh.world)
        else:
            host, _, port = assigned.store.rpartition(":")
            talk_through(host)
            store = dist.TCPStore(host, int(port), is_master=False)
        ranks = join_ranks(mesh, assigned.rank, self._local_size, store, device)
        return load_runner(config, read_arch(Path(config.model)), device, ranks), ranks

    def _work(self, runner: Runner, ranks: RankGroups) -> NoReturn:
        launched: SimpleQueue[RunnerStep] = SimpleQueue()
        threading.Thread(
            target=self._report, args=(launched, ranks.reports), name="results", daemon=True
        ).start()
        while True:
            plan: StepPlan = self._receive()
            launched.put(runner.launch(plan))

    def _report(self, launched: SimpleQueue[RunnerStep], tells: bool) -> None:
        """Wait for each step in turn, where a fault of the device shows, and tell its result."""
        socket, _ = self._connect()
        try:
            while True:
                result: StepResult = launched.get().wait()
                if tells:
                    socket.send_multipart(wire.encode(result))
        except Exception as error:
            log.exception("a step failed")
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        """Tell the engine, and wait for the end that it makes of this group."""
        socket, _ = self._connect()
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        socket.send_multipart(wire.encode(wire.Failed(self._rank, message)))
        threading.Event().wait()
        raise AssertionError
