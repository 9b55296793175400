"""A worker process: one rank of a worker group, which runs the engine's plans.

The engine starts the workers of its own machine; torchrun starts those of other machines. A worker
joins the engine, receives its rank, loads its shard of the model and runs every plan it receives.
When the engine is lost, a worker on the engine's machine ends. A worker on another machine executes
itself again in the same process and waits for the next engine. Knows nothing of requests.
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
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn

import msgspec
import torch.distributed as dist
import zmq

from gllm_engine import wire
from gllm_engine.arch import read_arch
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.os_process import Process, end_with, end_with_any_thread
from gllm_engine.parallel import Mesh, RankGroups, join_ranks, talk_through
from gllm_engine.runner import LayerMove, PlanError, Runner, RunnerStep, default_threads
from gllm_engine.timeline import OFF, NoRecorder, Recorder, activity
from gllm_engine.types import StepPlan, StepResult
from gllm_engine.workers import channel
from gllm_engine.workers.build_runner import device_of, load_runner

_REFUSED = 78  # exit status: os.EX_CONFIG
# A pause before the restart, so that a worker that is always refused causes little load.
_REFUSED_PAUSE_S = 5.0
# Seconds that a thread computes before another one may: usually, and while layers are loaded.
_TURN_S = sys.getswitchinterval()
_SHORT_TURN_S = 1e-4

log = logging.getLogger("gllm.worker")


def main(arguments: list[str] | None = None) -> int:
    """`python -m gllm_engine.worker`; see docs in --help."""
    options = _parser().parse_args(arguments)
    owner = Process.of(options.owner or os.getppid())
    end_with(owner, lambda: _clear_away(options.engine))
    end_with_any_thread()
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
    parser.add_argument("--engine", required=True, help="tcp://HOST:PORT of the engine's node")
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
    """Remove the socket directory of a local engine, because a killed engine cannot do it."""
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
        self._move: LayerMove | None = None  # loaded, and not yet done
        self._context = zmq.Context()
        self._plans, self._monitor = self._connect()

    def run(self) -> int:
        assigned = self._join()
        self._rank = assigned.rank
        try:
            runner, ranks = self._load(assigned)
            self._plans.send_multipart(
                wire.encode(
                    wire.Ready(runner.num_pages, runner.num_snapshots, len(runner.decoder.layers))
                )
            )
            self._work(runner, ranks, layers_move=assigned.config.spare_layers > 0)
        except Exception as error:  # any error caused by a peer or a checkpoint
            log.exception("rank %d fails", self._rank)
            self._fail(_in_a_line(error))
        return 1

    def _join(self) -> wire.Assigned:
        options = self._options
        # The engine reports why it ended; the worker only logs the loss.
        threading.Thread(
            target=self._begin_anew_once_lost, name="engine-watch", daemon=True
        ).start()
        join = wire.Join(
            wire.PROTOCOL,
            channel.rank_software(),
            channel.digest(Path(options.model)),
            options.node_rank,
            options.nnodes,
            self._local_rank,
            self._local_size,
        )
        self._plans.send_multipart(wire.encode(join))
        try:
            answer = self._receive()
        except wire.NotAMessage as error:
            raise _Refused(f"the engine is of another version, its answer is {error}") from None
        if isinstance(answer, wire.Refusal):
            raise _Refused(answer.message)
        if not isinstance(answer, wire.Assigned):
            raise _Refused(f"the engine answers with a message of type {type(answer).__name__}")
        return answer

    def _receive(self) -> msgspec.Struct:
        while True:
            message = wire.decode(self._plans.recv_multipart())
            if not isinstance(message, wire.Ping):
                return message

    def _connect(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        return channel.connect(self._context, self._options.engine, self._secret)

    def _not_heard(self) -> None:
        address = self._options.engine
        key_file = self._options.cluster_key_file
        log.warning(
            "%s breaks off the greeting: it is no engine, or its key is not the one in %s; "
            "this worker goes on trying",
            address,
            key_file,
        )

    def _begin_anew_once_lost(self) -> NoReturn:
        """End or restart this process when the engine is lost; other threads may be blocked."""
        channel.await_loss(self._monitor, self._not_heard)
        if _is_local(self._options.engine):
            _clear_away(self._options.engine)
            os._exit(1)
        log.warning("the engine is lost; this worker waits for another")
        time.sleep(1)  # other workers of this node notice the loss in this time
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2:  # libraries leave their file descriptors inheritable
                with contextlib.suppress(OSError):
                    os.set_inheritable(number, False)
        os.execv(sys.executable, [sys.executable, "-m", "gllm_engine.worker", *sys.argv[1:]])

    def _load(self, assigned: wire.Assigned) -> tuple[Runner, RankGroups]:
        threads = assigned.config.cpu_threads or default_threads(self._local_size)
        config: EngineConfig = msgspec.structs.replace(
            assigned.config, model=self._options.model, cpu_threads=threads
        )
        device = device_of(config, self._local_rank)
        mesh = Mesh(config.pipeline_parallel_size, config.tensor_parallel_size)
        store: dist.Store
        if config.nnodes == 1:
            talk_through("127.0.0.1")
            store = dist.FileStore(assigned.store, mesh.world)
        else:
            host, port = channel.split_host(assigned.store)
            talk_through(host)
            store = dist.TCPStore(host, port, is_master=False)
        ranks = join_ranks(mesh, assigned.rank, self._local_size, store, device)
        recorder = OFF if config.timeline is None else Recorder()
        arch = read_arch(Path(config.model))
        return load_runner(config, arch, device, ranks, recorder), ranks

    def _work(self, runner: Runner, ranks: RankGroups, layers_move: bool) -> NoReturn:
        launched: SimpleQueue[RunnerStep] = SimpleQueue()
        recorder = runner.recorder
        cuts: SimpleQueue[tuple[int, ...]] = SimpleQueue()
        report = partial(self._report, launched, ranks, recorder)
        load_layers = partial(self._load_layers, cuts, runner, ranks)
        threading.Thread(target=report, name="results", daemon=True).start()
        if layers_move:
            threading.Thread(target=load_layers, name="layers", daemon=True).start()
        while True:
            recorder.mark(activity.AWAIT_PLAN)
            plan = self._receive()
            if isinstance(plan, wire.AskSpans):
                self._plans.send_multipart(wire.encode(recorder.spans(self._rank)))
                continue
            if isinstance(plan, wire.LoadLayers):
                cuts.put(plan.cut)
                continue
            try:
                if isinstance(plan, wire.PutImages):
                    runner.put_images(plan.images)
                elif isinstance(plan, wire.MoveLayers):
                    self._move_layers(runner)
                elif isinstance(plan, StepPlan):
                    launched.put(runner.launch(plan))
                else:
                    raise RuntimeError(f"the engine sent a {type(plan).__name__}, not a plan")
            except PlanError as error:  # all ranks raise it, before they exchange any data
                assert isinstance(plan, StepPlan)
                log.exception("step %d is not done", plan.step)
                failed = wire.StepFailed(self._rank, plan.step, _in_a_line(error))
                self._plans.send_multipart(wire.encode(failed))
            except Exception as error:  # any error of a kernel
                self._fail_in_step(error)

    def _load_layers(
        self, cuts: SimpleQueue[tuple[int, ...]], runner: Runner, ranks: RankGroups
    ) -> NoReturn:
        """Load the layers that come with each of `cuts`, while the main thread launches steps."""
        socket, _ = self._connect()
        while True:
            cut = cuts.get()
            self._move = None
            problem = ""
            # The main thread must not wait long for its turn between two launches.
            sys.setswitchinterval(_SHORT_TURN_S)
            try:
                self._move = LayerMove(runner, ranks, cut) if cut else None
            except Exception as error:  # no memory, or a file that cannot be read
                log.exception("layers cannot be loaded")
                problem = _in_a_line(error)
            sys.setswitchinterval(_TURN_S)
            socket.send_multipart(wire.encode(wire.LayersLoaded(self._rank, problem)))

    def _move_layers(self, runner: Runner) -> None:
        runner.recorder.mark(activity.MOVE)
        start = time.monotonic()
        assert self._move is not None
        self._move.finish()
        self._move = None
        shard = runner.decoder.shard
        took = time.monotonic() - start
        told = f"layers {shard.first} to {shard.end - 1}, moved in {took:.2f} s"
        log.info("rank %d: %s", self._rank, told)

    def _report(
        self, launched: SimpleQueue[RunnerStep], ranks: RankGroups, recorder: NoRecorder
    ) -> None:
        """Wait for each step and tell its result, or its time. A device fault is raised here."""
        socket, _ = self._connect()
        try:
            while True:
                step = launched.get()
                began = time.monotonic_ns()
                result: StepResult = step.wait()
                ended = time.monotonic_ns()
                recorder.add("results", activity.AWAIT_DEVICE, result.step, began, ended)
                if ranks.reports:
                    socket.send_multipart(wire.encode(result))
                elif ranks.tensor.rank == 0:
                    seconds = wire.StageTime(ranks.stage, result.step, result.seconds)
                    socket.send_multipart(wire.encode(seconds))
        except Exception as error:
            self._fail_in_step(error)

    def _fail_in_step(self, error: Exception) -> NoReturn:
        log.exception("a step failed")
        self._fail(
            f"{_in_a_line(error)}; how far other ranks have come in that step is not known, so all "
            "of them begin anew"
        )

    def _fail(self, message: str) -> NoReturn:
        """Send Failed to the engine, then wait until the engine ends this group."""
        socket, _ = self._connect()
        socket.send_multipart(wire.encode(wire.Failed(self._rank, message)))
        threading.Event().wait()
        raise AssertionError


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
