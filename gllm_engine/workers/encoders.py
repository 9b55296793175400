"""The engine's side of its encoders: starts those of this machine, gives images to all of them.

An encoder is nobody's peer: ranks read only places that the engine knows to be written. So one that
dies costs a second try of its images by another encoder. Encoders of other machines come and go.
Knows nothing of requests, of tensors, or of how an encoder works.
"""

from __future__ import annotations

import contextlib
import logging
import math
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq

from gllm_engine import wire
from gllm_engine.arch import Model
from gllm_engine.config import EngineConfig
from gllm_engine.types import ImagePixels, LandingHandle
from gllm_engine.workers import channel
from gllm_engine.workers.meeting import (
    ENDS_S,
    FIRST_COMES_S,
    REMIND_S,
    TICK_MS,
    GroupLost,
    Meeting,
    difference,
    other_protocol,
    refuse,
)

# An encoder has one batch beside the one that it encodes, so that it need not wait for the next.
_BATCHES = 2
# Small images are encoded together up to so many tokens, with which a GPU has enough to do.
_BATCH_TOKENS = 1024
# An image is given up after so many encoders have ended with it.
_MOST_DEATHS = 3
# After so many failed starts in a row images no longer wait for an encoder.
_MOST_FAILED_STARTS = 5
# Before a dead encoder is started again; twice as long after each start that fails.
_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
# An encoder that does not answer for so long hangs.
_ANSWER_S = 300.0
# One that has joined and does not load the tower in so long hangs, though it lives.
_LOADS_S = 3600.0

log = logging.getLogger("gllm.group")


class Landed(NamedTuple):
    """The embeddings of an image are at `place` of every landing, until `Encoders.release`."""

    number: int
    place: int


class NotLanded(NamedTuple):
    """An image that cannot be encoded, and why, in a sentence."""

    number: int
    message: str


class EncoderStats(NamedTuple):
    """Now: encoders that take images, images that no encoder has, images that one has, and
    encoders that were killed and do not end.
    """

    encoders: int
    waiting: int
    encoding: int
    stuck: int


@dataclass(eq=False)
class _Job:
    image: ImagePixels
    tokens: int
    place: int = -1  # while an encoder has it
    deaths: int = 0  # of encoders, while they encoded it
    is_wanted: bool = True


@dataclass(eq=False)
class _Encoder:
    """One that has joined."""

    name: str
    socket: zmq.Socket[bytes]
    identity: bytes
    slot: _Slot | None  # None: of another machine
    is_ready: bool = False
    is_leaving: bool = False
    # What it has not answered, in the order in which it encodes.
    batches: deque[list[_Job]] = field(default_factory=deque)
    busy_since: float = 0.0  # since its last answer, or since it has a batch; monotonic clock

    @property
    def takes_images(self) -> bool:
        return self.is_ready and not self.is_leaving

    @property
    def tokens(self) -> int:
        return sum(job.tokens for batch in self.batches for job in batch)

    def take(self, number: int) -> _Job | None:
        """The image that it has answered; None if it does not have it."""
        for batch in self.batches:
            for job in batch:
                if job.image.number == number:
                    batch.remove(job)
                    if not batch:
                        self.batches.remove(batch)
                    return job
        return None


@dataclass(eq=False)
class _Slot:
    """An encoder of this machine, and its successors."""

    number: int
    child: subprocess.Popen[bytes] | None = None
    encoder: _Encoder | None = None
    has_served: bool = False  # the child
    problem: str = ""  # what the child has told of its end
    failed_starts: int = 0  # since an encoder has served here
    begin_at: float = 0.0  # of the next start, on the monotonic clock
    late_at: float = 0.0  # the child hangs if it has not joined then, or if it has, not loaded
    places: list[int] = field(default_factory=list)  # which the child may write until it has ended
    stuck_at: float = math.inf  # the child was killed, and is stuck if it has not ended then
    is_stuck: bool = False


class Encoders:
    """`config.encoder_workers` encoders of this machine, and those of others that join. Only one
    thread may use it.

    An image is `submit`ted once, and `poll` then tells once that it has landed or cannot, unless it
    is cancelled first.
    """

    def __init__(
        self,
        config: EngineConfig,
        arch: Model,
        landings: list[LandingHandle],
        land: Callable[[int, bytes], None],
    ) -> None:
        """Blocks until all encoders of this machine are ready. Raises ConfigError for an invalid
        configuration, GroupLost if an encoder cannot start.

        `config`: settled. `landings`: of the ranks of the first stage, all alike. `land` writes the
        bytes of an encoder of another machine to a place of each of them, before the next plan.
        """
        assert arch.vision is not None
        self._config = config
        self._grid = arch.vision.grid
        self._landings = landings
        self._land = land
        self._digest = channel.digest(Path(config.model))
        self._queue: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}  # by number; those that are wanted and not done
        self._done: list[Landed | NotLanded] = []
        self._taken: dict[int, int] = {}  # tokens by place
        self._encoders: list[_Encoder] = []
        self._is_torn = False  # an interrupt has left a message or a place half done
        self._last_problem = ""  # of a failed start
        self._num_others = 0  # encoders of other machines that have joined so far
        self._slots = [_Slot(number) for number in range(config.encoder_workers)]
        self._meeting = Meeting()
        try:
            if config.cluster_key_file is not None:
                self._meeting.open_to_others(config, config.master_port + 2, "encoders")
            for slot in self._slots:
                self._start(slot)
            remind = time.monotonic() + REMIND_S
            while missing := [slot.number for slot in self._slots if not slot.has_served]:
                self._listen(TICK_MS)
                self._look_after()
                if self._last_problem:
                    raise GroupLost(self._last_problem)
                if time.monotonic() > remind:
                    remind += REMIND_S
                    log.info("waiting for encoders to load: %s", missing)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ for the engine

    def submit(self, image: ImagePixels) -> None:
        """Have an image encoded. Its number is not that of another image that is not done."""
        rows, columns = self._grid(image.height, image.width)
        job = _Job(image, rows * columns)
        with self._in_one_go():
            self._jobs[image.number] = job
            if job.tokens > self._landings[0].tokens:
                most = self._landings[0].tokens
                self._give_up(job, f"it has {job.tokens} tokens, encoders take {most} at most")
                return
            self._queue.append(job)
            self._give()

    def cancel(self, number: int) -> None:
        """Nobody needs this image any more: `poll` will not tell of it. Has no effect on an image
        that is done, of which it tells; the place of one that has landed must still be released.
        """
        job = self._jobs.pop(number, None)
        if job is None:
            return
        job.is_wanted = False  # an encoder may have it: then its place is taken until it answers
        if job in self._queue:
            self._queue.remove(job)

    def poll(self) -> list[Landed | NotLanded]:
        """What has become of images since the last call. Never blocks; call it at least every
        100 ms, and when one of `sockets` has something. Raises GroupLost after an interrupt, and
        what `land` raises: all images must then be cancelled.
        """
        if self._is_torn:
            raise GroupLost("the encoders are lost: a message to or from one was interrupted")
        with self._in_one_go():
            self._listen(0)
            self._look_after()
            self._give()
        done = self._done
        self._done = []
        return done

    def release(self, places: Iterable[int]) -> None:
        """The ranks have taken what was at these places."""
        with self._in_one_go():
            for place in places:
                del self._taken[place]
            self._give()

    @contextlib.contextmanager
    def _in_one_go(self) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self._is_torn = True
            raise

    def sockets(self) -> list[zmq.Socket[bytes]]:
        """They have something when `poll` may have news; always the same ones."""
        return [*self._meeting.sockets, *self._meeting.monitors]

    def stats(self) -> EncoderStats:
        encoding = sum(len(batch) for encoder in self._encoders for batch in encoder.batches)
        stuck = sum(slot.is_stuck for slot in self._slots)
        return EncoderStats(self._num_serving(), len(self._queue), encoding, stuck)

    def close(self) -> None:
        """Kill the encoders of this machine; those of others notice it. Idempotent."""
        self._meeting.end()

    # ------------------------------------------------------------ images

    def _num_serving(self) -> int:
        return sum(encoder.takes_images for encoder in self._encoders)

    def _give(self) -> None:
        """Give images to encoders, while there are encoders and places."""
        self._refuse_hopeless()
        while self._queue:
            free = [
                each
                for each in self._encoders
                if each.takes_images and len(each.batches) < _BATCHES
            ]
            batch = self._next_batch() if free else []
            if not batch:
                return
            encoder = min(free, key=lambda each: each.tokens)
            if not encoder.batches:
                encoder.busy_since = time.monotonic()
            encoder.batches.append(batch)
            images = [job.image for job in batch]
            self._tell(encoder, wire.Encode(images, [job.place for job in batch]))

    def _refuse_hopeless(self) -> None:
        """Give up images that would wait for an encoder or for a place for ever."""
        failed = [slot.failed_starts for slot in self._slots if not slot.is_stuck]
        none_starts = all(failed) and (not failed or sum(failed) >= _MOST_FAILED_STARTS)
        none_runs = none_starts and not self._num_serving()
        lost = self._lost()
        for job in [*self._queue] if none_runs or lost else ():
            if none_runs:
                why = "no encoder runs, the log says why"
            elif self._room(job.tokens, lost) is None:
                why = f"it has {job.tokens} tokens, and encoders that do not end keep their places"
            else:
                continue
            self._queue.remove(job)
            self._give_up(job, why)

    def _lost(self) -> dict[int, int]:
        """Tokens by place of what stuck encoders may still write."""
        stuck = [slot for slot in self._slots if slot.is_stuck]
        return {place: self._taken[place] for slot in stuck for place in slot.places}

    def _next_batch(self) -> list[_Job]:
        """Of the first images that wait, with their places. One whose encoder died is alone, so
        that no other image is blamed if it is the cause.
        """
        batch: list[_Job] = []
        while self._queue:
            job = self._queue[0]
            tokens = job.tokens + sum(each.tokens for each in batch)
            if batch and (tokens > _BATCH_TOKENS or job.deaths or batch[0].deaths):
                break
            place = self._room(job.tokens, self._taken)
            if place is None:
                break
            job.place = place
            self._taken[place] = job.tokens
            batch.append(self._queue.popleft())
        return batch

    def _room(self, tokens: int, taken: dict[int, int]) -> int | None:
        """The first place where so many tokens are free, if those of `taken` are not."""
        at = 0
        for place, size in sorted(taken.items()):
            if place - at >= tokens:
                break
            at = place + size
        return at if at + tokens <= self._landings[0].tokens else None

    def _give_up(self, job: _Job, message: str) -> None:
        if job.is_wanted:
            del self._jobs[job.image.number]
            self._done.append(NotLanded(job.image.number, message))

    def _handle_answer(self, encoder: _Encoder, answer: wire.Encoded | wire.NotEncoded) -> None:
        job = encoder.take(answer.number)
        if job is None:
            self._lose(encoder, f"it has answered for image {answer.number}, which it has not")
            return
        encoder.busy_since = time.monotonic()
        if isinstance(answer, wire.NotEncoded):
            log.warning("%s: %s", encoder.name, answer.message)
            self._give_up(job, answer.message)
        elif encoder.slot is None and len(answer.embeddings) != self._num_bytes(job):
            encoder.batches.appendleft([job])
            expected = self._num_bytes(job)
            self._lose(
                encoder,
                f"it has sent {len(answer.embeddings)} bytes for an image of {expected} bytes",
            )
            return
        elif job.is_wanted:
            del self._jobs[answer.number]
            self._done.append(Landed(answer.number, job.place))
            if encoder.slot is None:  # last: if it raises, the image is cancelled, its place told
                self._land(job.place, answer.embeddings)
            return
        del self._taken[job.place]

    def _num_bytes(self, job: _Job) -> int:
        handle = self._landings[0]
        return job.tokens * handle.numbers * handle.itemsize

    # ------------------------------------------------------------ messages

    def _listen(self, timeout_ms: int) -> None:
        for socket, identity, message in self._meeting.receive(timeout_ms):
            encoder = self._encoder_of(socket, identity)
            if isinstance(message, wire.Join) and encoder is None:
                self._welcome(socket, identity, message)
            elif isinstance(message, wire.NotAMessage) and message.kind is wire.Join:
                refuse(socket, identity, "an encoder", other_protocol("encoder"))
            elif encoder is not None:  # else it is lost and ends
                self._handle(encoder, message)
        if self._meeting.in_doubt:
            for encoder in [*self._encoders]:
                self._tell(encoder, wire.Ping())

    def _encoder_of(self, socket: zmq.Socket[bytes], identity: bytes) -> _Encoder | None:
        for encoder in self._encoders:
            if encoder.socket is socket and encoder.identity == identity:
                return encoder
        return None

    def _handle(self, encoder: _Encoder, message: msgspec.Struct | wire.NotAMessage) -> None:
        if isinstance(message, (wire.Encoded, wire.NotEncoded)):
            self._handle_answer(encoder, message)
        elif isinstance(message, wire.EncoderReady):
            encoder.is_ready = True
            if encoder.slot is not None:
                encoder.slot.has_served = True
                encoder.slot.failed_starts = 0
            log.info("%s takes images", encoder.name)
        elif isinstance(message, wire.Leave):
            encoder.is_leaving = True
            log.info("%s leaves", encoder.name)
        elif isinstance(message, wire.Failed):
            if encoder.slot is not None:
                encoder.slot.problem = message.message
            self._lose(encoder, message.message)
        else:
            self._lose(encoder, f"it has sent what is no answer ({type(message).__name__})")
        if encoder.is_leaving and not encoder.batches:
            self._tell(encoder, wire.Leave())

    def _welcome(self, socket: zmq.Socket[bytes], identity: bytes, join: wire.Join) -> None:
        problem = difference(join, "encoder", self._digest, {})
        slot = None
        if not problem and socket is self._meeting.sockets[0]:
            slot = next((s for s in self._slots if s.number == join.local_rank), None)
            # A child that has ended may have sent this.
            if join.node or slot is None or slot.child is None or slot.encoder is not None:
                problem = "the encoder is none that this engine has started"
        if problem:
            refuse(socket, identity, "an encoder", problem)
            return
        if slot is None:
            self._num_others += 1
        name = f"encoder {slot.number}" if slot else f"remote encoder {self._num_others}"
        encoder = _Encoder(name, socket, identity, slot)
        if slot is not None:
            slot.encoder = encoder
            slot.late_at = time.monotonic() + _LOADS_S
        self._encoders.append(encoder)
        log.info("%s has joined", name)
        landings = self._landings if slot else []
        dtype = self._landings[0].dtype
        self._tell(encoder, wire.EncoderAssigned(self._config, dtype, landings))

    def _tell(self, encoder: _Encoder, message: msgspec.Struct) -> None:
        try:
            encoder.socket.send_multipart([encoder.identity, *wire.encode(message)])
        except zmq.ZMQError:
            self._lose(encoder, "it was killed, stopped or cut off")

    # ------------------------------------------------------------ ends and starts

    def _lose(self, encoder: _Encoder, why: str) -> None:
        """Put the images of an encoder at the front of the queue. Idempotent."""
        if encoder not in self._encoders:
            return
        self._encoders.remove(encoder)
        if encoder.is_leaving and not encoder.batches:
            log.info("%s has left", encoder.name)
        else:
            log.error("%s is lost: %s", encoder.name, why)
        for job in encoder.batches[0] if encoder.batches else ():
            job.deaths += 1
        jobs = [job for batch in encoder.batches for job in batch]
        places = [job.place for job in jobs]
        if encoder.slot is None:
            self._tell(encoder, wire.Leave())  # if it is there
            for place in places:
                del self._taken[place]
        else:
            encoder.slot.places += places
            self._kill(encoder.slot)
        for job in reversed(jobs):
            if job.deaths < _MOST_DEATHS:
                if job.is_wanted:
                    self._queue.appendleft(job)
            else:
                self._give_up(job, f"{job.deaths} encoders have ended while they encoded it")

    def _look_after(self) -> None:
        now = time.monotonic()
        for encoder in [*self._encoders]:
            if encoder.batches and now > encoder.busy_since + _ANSWER_S:
                self._lose(encoder, f"it has not answered for {_ANSWER_S:.0f} s")
        for slot in self._slots:
            if slot.child is None:
                if now >= slot.begin_at:
                    self._start(slot)
            elif slot.child.poll() is not None:
                self._bury(slot, slot.child)
            elif now > slot.late_at and not slot.has_served:
                missing = "joined" if slot.encoder is None else "loaded"
                slot.problem = f"it was started and has not {missing}: it is stopped, or hangs"
                slot.late_at = math.inf
                self._kill(slot)
            elif now > slot.stuck_at and not slot.is_stuck:
                slot.is_stuck = True
                self._tell_stuck(slot, slot.child.pid)

    def _kill(self, slot: _Slot) -> None:
        if slot.child is not None:
            slot.child.kill()
            slot.stuck_at = time.monotonic() + ENDS_S

    def _tell_stuck(self, slot: _Slot, pid: int) -> None:
        """Its places are lost until it ends: a GPU may still write there. It has no successor until
        then, because what holds it would hold that too, and both would need the GPU's memory.
        """
        lost = sum(self._taken[place] for place in slot.places)
        why = (
            f"process {pid} does not end though it was killed; until it does, {lost} of the "
            f"{self._landings[0].tokens} tokens of the landing are lost, and no other is started"
        )
        log.error("encoder %d: %s", slot.number, why)
        if not slot.has_served:
            self._last_problem = f"encoder {slot.number} cannot start: {why}"

    def _start(self, slot: _Slot) -> None:
        gpu = self._config.num_ranks // self._config.nnodes + slot.number
        arguments = ["--model", self._config.model, "--gpu", str(gpu), "--number", str(slot.number)]
        slot.has_served = False
        slot.stuck_at = math.inf
        slot.problem = ""
        slot.late_at = time.monotonic() + FIRST_COMES_S
        try:
            slot.child = self._meeting.start("gllm_engine.encoder", arguments, {})
        except OSError as error:  # the machine has no memory, or too many processes
            self._pause(slot, str(error))

    def _bury(self, slot: _Slot, child: subprocess.Popen[bytes]) -> None:
        """The process has ended, so it writes nothing any more."""
        why = slot.problem or f"its process ended with status {child.returncode}"
        if slot.encoder is not None:
            self._lose(slot.encoder, why)
        slot.encoder = None
        slot.child = None
        slot.is_stuck = False
        self._meeting.children.remove(child)
        for place in slot.places:
            del self._taken[place]
        slot.places = []
        self._pause(slot, why)

    def _pause(self, slot: _Slot, why: str) -> None:
        """Before the next start."""
        if not slot.has_served:
            slot.failed_starts += 1
            self._last_problem = f"encoder {slot.number} cannot start: {why}"
            log.error("%s", self._last_problem)
        pause = min(_PAUSE_S * 2 ** min(slot.failed_starts, 9), _LONGEST_PAUSE_S)
        slot.begin_at = time.monotonic() + pause
