"""A worker process: one rank of a worker group, which runs the engine's plans.

The engine starts the workers of its own machine; torchrun starts those of other machines. A worker
joins the engine, receives its rank, loads its shard of the model and runs every plan it receives.
Knows nothing of requests, nor of how a process joins (member.py).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn

import msgspec
import torch.distributed as dist

from gllm_engine import wire
from gllm_engine.arch import read_arch
from gllm_engine.config import EngineConfig
from gllm_engine.parallel import Mesh, RankGroups, join_ranks, talk_through
from gllm_engine.runner import LayerMove, PlanError, Runner, RunnerStep, default_threads
from gllm_engine.timeline import OFF, NoRecorder, Recorder, activity
from gllm_engine.types import Span, StepPlan, StepResult
from gllm_engine.workers import channel
from gllm_engine.workers.build_runner import device_of, load_runner
from gllm_engine.workers.member import Member, add_options, in_a_line, number, run_member

# Seconds that a thread computes before another one may: usually, and while layers are loaded.
_TURN_S = sys.getswitchinterval()
_SHORT_TURN_S = 1e-4

log = logging.getLogger("gllm.worker")


def main(arguments: list[str] | None = None) -> int:
    """`python -m gllm_engine.worker`; see docs in --help."""
    options = _parser().parse_args(arguments)
    options.owner = options.owner or os.getppid()
    return run_member(options, _Worker)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun --standalone --nproc-per-node N -m gllm_engine.worker",
        description="The workers of a node that is not the engine's, one a GPU.",
    )
    add_options(parser)
    parser.add_argument("--node-rank", default="0", help="of this node, the engine's is 0")
    parser.add_argument("--nnodes", default="2", help="as the engine's")
    return parser


class _Worker(Member):
    _role = "worker"

    def __init__(self, options: argparse.Namespace) -> None:
        self._local_rank = number("LOCAL_RANK", os.environ.get("LOCAL_RANK", "0"))
        self._local_size = number("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
        options.node_rank = number("--node-rank", options.node_rank)
        options.nnodes = number("--nnodes", options.nnodes)
        self._move: LayerMove | None = None  # loaded, and not yet done
        super().__init__(options)

    def run(self) -> int:
        assigned = self._join()
        self._rank = assigned.rank
        try:
            runner, ranks = self._load(assigned)
            self._socket.send_multipart(
                wire.encode(
                    wire.Ready(
                        runner.num_pages,
                        runner.num_snapshots,
                        len(runner.decoder.layers),
                        runner.landings,
                    )
                )
            )
            self._work(runner, ranks, layers_move=assigned.config.spare_layers > 0)
        except Exception as error:  # any error caused by a peer or a checkpoint
            log.exception("rank %d fails", self._rank)
            self._fail(in_a_line(error))
        return 1

    def _join(self) -> wire.Assigned:
        options = self._options
        return self._greet(
            wire.Join(
                wire.PROTOCOL,
                channel.rank_software(),
                channel.digest(Path(options.model)),
                options.node_rank,
                options.nnodes,
                self._local_rank,
                self._local_size,
            ),
            wire.Assigned,
        )

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
                self._socket.send_multipart(wire.encode(recorder.spans(self._rank)))
                continue
            if isinstance(plan, wire.LoadLayers):
                cuts.put(plan.cut)
                continue
            try:
                if isinstance(plan, wire.PutImages):
                    runner.put_images(plan.images)
                elif isinstance(plan, wire.PutEmbeddings):
                    runner.land(plan.place, plan.embeddings)
                elif isinstance(plan, wire.MoveLayers):
                    self._move_layers(runner)
                elif isinstance(plan, StepPlan):
                    step = runner.launch(plan)
                    launched.put(step)
                    if plan.arrived and step.timer is None and runner.landing is not None:
                        self._socket.send_multipart(wire.encode(wire.ImagesFetched(plan.step)))
                else:
                    raise RuntimeError(f"the engine sent a {type(plan).__name__}, not a plan")
            except PlanError as error:  # all ranks raise it, before they exchange any data
                assert isinstance(plan, StepPlan)
                log.exception("step %d is not done", plan.step)
                failed = wire.StepFailed(self._rank, plan.step, in_a_line(error))
                self._socket.send_multipart(wire.encode(failed))
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
                problem = in_a_line(error)
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
                recorder.add(Span("results", activity.AWAIT_DEVICE, result.step, began, ended))
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
            f"{in_a_line(error)}; how far other ranks have come in that step is not known, so all "
            "of them begin anew"
        )

    def _fail(self, message: str) -> NoReturn:
        """Send Failed to the engine, then wait until the engine ends this group."""
        socket, _ = self._connect()
        socket.send_multipart(wire.encode(wire.Failed(self._rank, message)))
        threading.Event().wait()
        raise AssertionError
