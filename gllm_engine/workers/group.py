"""The engine's side of a worker group: starts the workers of this machine, waits for those of other
machines, sends each plan to all workers and receives the results of the last stage.

If one worker is lost or fails, the whole group is lost: the progress of the other ranks in the step
is unknown. The engine then ends with all its workers, and the next engine gathers a new group. The
one exception is a step that every rank has refused: no rank has computed it, so only this step
fails. Knows nothing of requests, of tensors, or of how workers run a plan.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from gllm_engine import wire
from gllm_engine.arch import Model
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.types import ImagePixels, LandingHandle, RankSpans, StepPlan, StepResult
from gllm_engine.workers import channel
from gllm_engine.workers.meeting import (
    FIRST_COMES_S,
    REMIND_S,
    TICK_MS,
    GroupLost,
    Meeting,
    difference,
    other_protocol,
    refuse,
)
from gllm_engine.workers.stage_balance import StageBalance

if TYPE_CHECKING:
    import torch.distributed as dist

# A rank may fail because another rank is gone. The loss of the other rank shows within this time.
_BLAME_S = 0.2
# Once the first worker of this machine has come, the others must join within this time.
_OTHERS_COME_S = 60.0
# After one rank refuses a step, all others must within this time; they may run earlier steps.
_AGREE_S = 5.0
# A move of layers takes less time: the transfer of their caches, and the capture of CUDA graphs.
_MOVE_S = 120.0
# Ranks that are asked for their timeline answer within this time, after the plans in flight.
_SPANS_S = 5.0

log = logging.getLogger("gllm.group")


class StepRefused(RuntimeError):
    """All ranks have refused this step and can run the next one; the message says why."""


class _Stranger(Exception):
    """The sender of a message is not a member of the group."""


@dataclass(frozen=True)
class _RefusedStep:
    """A step that some or all ranks have refused."""

    message: str
    until: float  # deadline for the refusals of all ranks, on the monotonic clock
    ranks: set[int]


@dataclass(frozen=True)
class _GroupStep:
    group: WorkerGroup
    step: int
    only_fetches: bool  # the first stage alone has something to do: it fetches images

    def wait(self) -> StepResult:
        result = self.group.result_of(self.step)
        if self.only_fetches:  # the last stage does not wait for the first
            self.group.await_fetched(self.step)
        return result


class WorkerGroup:
    """A StepRunner that runs plans on `config.num_ranks` workers. Only one thread may use it.

    The constructor blocks until every worker has joined and loaded its shard of the model. Raises
    ConfigError for an invalid configuration, GroupLost for a worker that cannot start.
    """

    def __init__(self, config: EngineConfig, arch: Model) -> None:
        self._config = config
        self._per_node = config.num_ranks // config.nnodes
        self._digest = channel.digest(Path(config.model))
        # rank -> the socket of the worker and its identity on that socket
        self._members: dict[int, tuple[zmq.Socket[bytes], bytes]] = {}
        self._results: deque[StepResult] = deque()
        self._ready: dict[int, wire.Ready] = {}  # by rank
        self._refused: dict[int, _RefusedStep] = {}  # by step
        self._spans: dict[int, RankSpans] = {}  # by rank
        self._slowest: dict[int, float] = {}  # by step, seconds of the slowest stage so far
        self._fetched = Counter[int]()  # by step: ranks that have fetched its images
        self._failure: wire.Failed | None = None
        self._error: str | None = None
        self._moving_until = 0.0  # some ranks may still move layers, on the monotonic clock
        self._meeting = Meeting()
        try:
            if config.nnodes > 1:
                self._meeting.open_to_others(config, config.master_port, "workers")
            self._start_workers(self._meeting.address)
            self._gather(lambda: len(self._members) == config.num_ranks, "to come")
            self._store, place = self._open_store()
            for rank in self._members:
                self._tell(rank, wire.encode(wire.Assigned(rank, config, place)))
            self._gather(lambda: len(self._ready) == config.num_ranks, "to load the model")
        except BaseException:
            self.close()
            raise
        self.num_pages = min(ready.num_pages for ready in self._ready.values())
        self.num_snapshots = min(ready.num_snapshots for ready in self._ready.values())
        firsts = range(0, config.num_ranks, config.tensor_parallel_size)
        cut = tuple(self._ready[rank].num_layers for rank in firsts)
        runs = [len(run) for run in arch.runs()]
        self._balance = StageBalance(cut, runs, config.spare_layers, config.num_ranks)

    # ------------------------------------------------------------ as a StepRunner

    def launch(self, plan: StepPlan) -> _GroupStep:
        """Raises GroupLost."""
        frames = wire.encode(plan)
        with self._in_one_go():
            self.check()
            message = self._balance.due()
            if message is not None:
                self._tell_all(wire.encode(message))
            if isinstance(message, wire.MoveLayers):
                self._moving_until = time.monotonic() + _MOVE_S
            self._tell_all(frames)
        only_fetches = bool(plan.arrived) and not (plan.decode_slots or plan.chunks)
        return _GroupStep(self, plan.step, only_fetches)

    def put_images(self, images: list[ImagePixels]) -> None:
        """Send the images that the next plan encodes to the ranks of the first stage."""
        self._tell_first(wire.PutImages(images))

    @property
    def landings(self) -> list[LandingHandle]:
        """Of the ranks of the first stage, for encoders."""
        firsts = range(self._config.tensor_parallel_size)
        return [landing for rank in firsts for landing in self._ready[rank].landings]

    def land(self, place: int, embeddings: bytes) -> None:
        """Put what an encoder of another machine has made into the landings. Raises GroupLost."""
        self._tell_first(wire.PutEmbeddings(place, embeddings))

    def _tell_first(self, message: msgspec.Struct) -> None:
        """Tell the ranks of the first stage."""
        frames = wire.encode(message)
        with self._in_one_go():
            for rank in range(self._config.tensor_parallel_size):
                self._tell(rank, frames)

    def await_fetched(self, step: int) -> None:
        """Wait until all ranks of the first stage have fetched the images of a step. Raises
        GroupLost.
        """
        while True:
            with self._in_one_go():
                self.check()
            if self._fetched[step] == self._config.tensor_parallel_size:
                del self._fetched[step]
                return
            self._meeting.wait(TICK_MS)

    def result_of(self, step: int) -> StepResult:
        """Wait for the result of a step; results of earlier steps are dropped.

        Raises StepRefused if all ranks have refused the step, GroupLost if the group is lost.
        """
        while True:
            with self._in_one_go():
                self.check()
            while self._results:
                result = self._results.popleft()
                if result.step == step:
                    self._forget_refused(step)
                    return self._with_slowest(result)
            refused = self._refused.get(step)
            if refused is not None and len(refused.ranks) == self._config.num_ranks:
                self._forget_refused(step)
                raise StepRefused(refused.message)
            self._meeting.wait(TICK_MS)

    def _note_time(self, stage: int, step: int, seconds: float) -> None:
        """`seconds`: of the step on a stage; 0 if the step computes nothing."""
        if seconds:
            self._slowest[step] = max(seconds, self._slowest.get(step, 0.0))
            self._balance.observe(stage, seconds)

    def _with_slowest(self, result: StepResult) -> StepResult:
        """The result with the time of the slowest stage, which sets the pace."""
        seconds = self._slowest.get(result.step, 0.0)
        self._slowest = {step: s for step, s in self._slowest.items() if step > result.step}
        return msgspec.structs.replace(result, seconds=seconds)

    def is_alive(self) -> bool:
        return self._error is None

    def check(self) -> None:
        """Raises GroupLost once a worker is lost or has failed."""
        if self._error is None:
            self._listen(0)
            self._look_at_processes()
            self._look_at_refused_steps()
        if self._error is not None:
            self._meeting.end()  # the remaining workers may be blocked waiting for the lost one
            raise GroupLost(self._error)

    def spans(self) -> list[RankSpans]:
        """The timelines of all ranks that answer. With a lost group they are none."""
        self._spans.clear()
        until = time.monotonic() + _SPANS_S
        with contextlib.suppress(GroupLost), self._in_one_go():
            self.check()
            self._tell_all(wire.encode(wire.AskSpans()))
            while len(self._spans) < len(self._members) and time.monotonic() < until:
                self._listen(TICK_MS)
                self.check()
        return list(self._spans.values())

    @contextlib.contextmanager
    def _in_one_go(self) -> Iterator[None]:
        """Lose the group on an interrupt: a plan may have reached only some of the workers."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self._error = self._error or "the group of workers was interrupted within a message"
            raise

    def close(self) -> None:
        """Kill the workers of this machine; remote workers notice the lost engine. Idempotent."""
        self._meeting.end()
        self._store = None

    # ------------------------------------------------------------ the start

    def _start_workers(self, address: str) -> None:
        """`address`: at which they join."""
        self._late_at = time.monotonic() + FIRST_COMES_S
        arguments = ["--model", self._config.model, "--nnodes", str(self._config.nnodes)]
        for local_rank in range(self._per_node):
            own = {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(self._per_node)}
            self._meeting.start("gllm_engine.worker", arguments, own)

    def _open_store(self) -> tuple[dist.Store | None, str]:
        """The torch store and its address: a file on one machine, else `master_port` + 1."""
        if self._config.nnodes == 1:
            return None, str(self._meeting.directory / "ranks")
        host = self._config.master_addr
        port = self._config.master_port + 1
        assert host is not None
        address = channel.join_host(host, port)
        try:
            listener = channel.listen_at(host, port)
        except OSError as error:
            raise ConfigError(f"master_port: cannot listen on {address} ({error})") from None
        import torch.distributed as dist  # late: an engine without a group needs no torch

        # The store takes over our listening socket; its own would listen on every address.
        store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return store, address

    def _gather(self, complete: Callable[[], bool], what: str) -> None:
        """Receive messages until `complete()` is true for all workers. Raises GroupLost."""
        remind = time.monotonic() + REMIND_S
        while not complete():
            self._listen(TICK_MS)
            self._look_for_late()
            self.check()
            if time.monotonic() > remind:
                remind += REMIND_S
                done = (
                    self._ready if len(self._members) == self._config.num_ranks else self._members
                )
                missing = [rank for rank in range(self._config.num_ranks) if rank not in done]
                log.info("waiting for workers %s: ranks %s", what, missing)

    # ------------------------------------------------------------ messages of workers

    def _listen(self, timeout_ms: int) -> None:
        for socket, identity, message in self._meeting.receive(timeout_ms):
            try:
                if isinstance(message, wire.NotAMessage):
                    self._refuse(socket, identity, message)
                else:
                    self._handle(socket, identity, message)
            except _Stranger:
                log.warning("a message came from a worker that has not joined")
        if self._meeting.in_doubt:
            self._look_for_lost()

    def _handle(self, socket: zmq.Socket[bytes], identity: bytes, message: msgspec.Struct) -> None:
        if isinstance(message, StepResult):
            last = self._config.pipeline_parallel_size - 1
            self._note_time(last, message.step, message.seconds)
            self._results.append(message)
        elif isinstance(message, wire.StageTime):
            self._note_time(message.stage, message.step, message.seconds)
        elif isinstance(message, wire.ImagesFetched):
            self._fetched[message.step] += 1
        elif isinstance(message, wire.LayersLoaded):
            self._balance.loaded(message.rank, message.problem)
        elif isinstance(message, wire.Ready):
            self._ready[self._rank_of(socket, identity)] = message
        elif isinstance(message, wire.StepFailed):
            until = max(time.monotonic(), self._moving_until) + _AGREE_S
            refused = _RefusedStep(message.message, until, set())
            self._refused.setdefault(message.step, refused).ranks.add(message.rank)
        elif isinstance(message, RankSpans):
            self._spans[self._rank_of(socket, identity)] = message
        elif isinstance(message, wire.Failed):
            self._failure = self._failure or message
        elif isinstance(message, wire.Join):
            problem = self._problem(message, is_own=socket is self._meeting.sockets[0])
            if not problem:
                rank = message.node * self._per_node + message.local_rank
                self._members[rank] = socket, identity
                if message.node == 0:
                    self._late_at = min(self._late_at, time.monotonic() + _OTHERS_COME_S)
                log.info("worker %d of node %d has come", message.local_rank, message.node)
                return
            refuse(socket, identity, f"a worker of node {message.node}", problem)

    def _refuse(self, socket: zmq.Socket[bytes], identity: bytes, error: wire.NotAMessage) -> None:
        """Handle an unreadable message. A Join may come from another version, so refuse it. Any
        other message comes from a member and may not be lost, so the group is lost.
        """
        if error.kind is wire.Join:
            refuse(socket, identity, "a worker", other_protocol("worker"))
        elif self._error is None:
            self._error = f"a worker has sent what is {error}"
            log.error("%s", self._error)

    def _problem(self, join: wire.Join, is_own: bool) -> str:
        """A sentence saying why a worker may not join; "" if it may."""
        config = self._config
        more = {
            "was started for a number of nodes of": (config.nnodes, join.nnodes),
            "was started with a number of workers a node of": (self._per_node, join.local_size),
        }
        problem = difference(join, "worker", self._digest, more)
        if problem:
            return problem
        if is_own != (join.node == 0) or not 0 <= join.node < config.nnodes:
            return (
                f"the worker's node rank is {join.node}; the engine's own node is 0, others are 1 "
                f"to {config.nnodes - 1}"
            )
        if not 0 <= join.local_rank < self._per_node:
            return f"the worker is number {join.local_rank} of {self._per_node}, counted from 0"
        if join.node * self._per_node + join.local_rank in self._members:
            return f"worker {join.local_rank} of node {join.node} is here already"
        return ""

    def _rank_of(self, socket: zmq.Socket[bytes], identity: bytes) -> int:
        """The rank of a member. Raises _Stranger for a worker that has not joined."""
        for rank, member in self._members.items():
            if member == (socket, identity):
                return rank
        raise _Stranger

    # ------------------------------------------------------------ loss

    def _look_at_processes(self) -> None:
        if self._failure is not None:
            time.sleep(_BLAME_S)
            self._look_for_lost()
        for child, rank in zip(self._meeting.children, range(self._per_node), strict=True):
            if child.poll() is not None:
                self._lose(rank, f"its process ended with status {child.returncode}")
        if self._failure is not None:
            self._lose(self._failure.rank, self._failure.message)

    def _look_for_late(self) -> None:
        """During the start: lose the group if a worker of this machine has not joined in time."""
        late = [rank for rank in range(self._per_node) if rank not in self._members]
        if late and time.monotonic() > self._late_at:
            self._lose(late[0], "it was started and has not come: it is stopped, or hangs")

    def _look_at_refused_steps(self) -> None:
        """Lose the group if some ranks refused a step and others did not before its deadline."""
        for refused in self._refused.values():
            if len(refused.ranks) < self._config.num_ranks and time.monotonic() > refused.until:
                why = f"{refused.message}; other ranks did that step, so they agree no longer"
                self._lose(min(refused.ranks), why)

    def _forget_refused(self, step: int) -> None:
        """Drop refused steps up to this one, except those that some ranks have not refused."""
        world = self._config.num_ranks
        self._refused = {
            number: refused
            for number, refused in self._refused.items()
            if number > step or len(refused.ranks) < world
        }

    def _look_for_lost(self) -> None:
        """Ping every member: a message to a lost member cannot be sent."""
        self._tell_all(wire.encode(wire.Ping()))

    def _tell_all(self, frames: list[bytes]) -> None:
        for rank in list(self._members):
            self._tell(rank, frames)

    def _tell(self, rank: int, frames: list[bytes]) -> None:
        socket, identity = self._members[rank]
        try:
            socket.send_multipart([identity, *frames])
        except zmq.ZMQError:
            complete = len(self._members) == self._config.num_ranks
            if complete or rank < self._per_node:
                self._lose(rank, "it was killed, stopped or cut off")
            else:  # a remote worker left before all had joined; it will join again
                log.info("worker %d left before the others came", rank)
                del self._members[rank]

    def _lose(self, rank: int, why: str) -> None:
        if self._error is None:
            self._error = f"worker {rank} (node {rank // self._per_node}) is lost: {why}"
            log.error("%s", self._error)
