"""A front end's connection to the engine: starts or joins the engine, and again after its death.

Owns one thread. Only this thread uses the socket and calls the callbacks. Knows nothing of text
or of Triton.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from gllm_engine import heartbeat, wire
from gllm_engine.config import EngineConfig
from gllm_engine.engine.attach import Attached, EngineError, StaleFrontEnd, attach, detach
from gllm_engine.os_process import wait_end
from gllm_engine.types import ModelInfo, Outputs, Request, Stats

RETRY_S = (0.1, 1.0, 5.0, 10.0)  # pauses between attempts to get an engine back
JOIN_TRIES = 3
GOODBYE_MS = 1000
# How long the last front end waits for the engine's end: an engine without work ends at once, but
# one that writes the timeline of many ranks takes a second for each.
ENDS_S = 10.0
WRITES_S = 60.0
# An engine opens its socket within this time after its start; importing torch may take minutes.
OPEN_S = 300.0
# An engine that has lost its front ends' connections, or has closed them, ends within this time.
END_S = 5.0
# Pixels that are on their way to an engine, which reads messages between two steps.
MAX_UNREAD_BYTES = 1 << 30

log = logging.getLogger("gllm.client")


class EngineUnavailable(RuntimeError):
    """No engine takes requests now; the message says why and whether one is being started."""


class EngineClient:
    """Submits sequences to the engine that serves `scope`, and passes its outputs to callbacks.

    `scope`: the model's name under the owner; front ends of one scope share one engine.
    `instance`: this front end's name in the scope. `owner_pid`: the process that the engine must
    not outlive; default: this process's parent. `on_outputs`, `on_stats` and `on_lost` are
    called on the client's own thread. `on_lost(sentence)`: every submitted sequence is lost.

    Raises EngineError when the engine cannot be started.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        scope: str,
        instance: str,
        on_outputs: Callable[[Outputs], None],
        on_stats: Callable[[Stats], None],
        on_lost: Callable[[str], None],
        owner_pid: int | None = None,
    ) -> None:
        self._config = config
        self._scope = scope
        self._instance = instance
        self._owner_pid = os.getppid() if owner_pid is None else owner_pid
        self._on_outputs = on_outputs
        self._on_stats = on_stats
        self._on_lost = on_lost
        self.failed_starts = 0  # consecutive failed attempts to replace a lost engine
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._lock = threading.Lock()  # guards the four below
        self._outgoing: deque[list[bytes]] = deque()
        self._unread = 0  # bytes of pixels that the engine has not read
        self._trouble: str | None = None  # why no engine takes requests now
        self._closing = False
        self._engine = self._join(again=False)
        self._thread = threading.Thread(target=self._run, name="engine-client", daemon=True)
        self._thread.start()

    def submit(self, requests: list[Request]) -> None:
        """Send sequences to the engine. If it raises EngineUnavailable, no sequence was sent."""
        message = wire.Submit.of(requests)
        self._send(message, message.size)

    def abort(self, ids: list[int]) -> None:
        """Tell the engine to end these sequences."""
        try:
            self._send(wire.Abort(ids))
        except EngineUnavailable:
            return  # the sequences were lost with the engine

    @property
    def trouble(self) -> str | None:
        """A sentence saying why the engine takes no requests now; None if it takes them."""
        return self._trouble

    def close(self) -> None:
        """Detach from the engine, which ends with its last front end. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        # Closed after the thread has ended: no thread may write to a reused file descriptor.
        os.close(self._wake)

    def _send(self, message: msgspec.Struct, pixels: int = 0) -> None:
        frames = wire.encode(message)  # an encoding error is raised to this caller alone
        with self._lock:
            if self._closing:
                raise EngineUnavailable("the model is being unloaded")
            if self._trouble is not None:
                raise EngineUnavailable(self._trouble)
            if pixels and self._unread and self._unread + pixels > MAX_UNREAD_BYTES:
                raise EngineUnavailable(
                    f"the queue is full: the engine has not read {self._unread} bytes of images, "
                    f"and with these {pixels} they would be more than {MAX_UNREAD_BYTES}"
                )
            self._unread += pixels
            self._outgoing.append(frames)
            os.eventfd_write(self._wake, 1)  # under the lock, because close() closes the eventfd

    # ------------------------------------------------------------ the client's thread

    def _run(self) -> None:
        try:
            while (why := self._converse()) is not None and self._rejoin(why):
                continue
            patience_s = ENDS_S if self._config.timeline is None else WRITES_S
            detach(self._engine.attached, self._instance, self._say_goodbye, patience_s)
        except Exception as error:  # if the thread ended silently, the streams would never end
            log.exception("the connection to the engine fails")
            self._lose(f"the connection to the engine failed ({type(error).__name__}: {error})")
        self._engine.close(GOODBYE_MS)

    def _say_goodbye(self) -> None:
        if self._trouble is None:
            self._engine.socket.send_multipart(wire.encode(wire.Goodbye()))

    def _converse(self) -> str | None:
        """Send and receive messages. Returns why the engine is lost, or None on close()."""
        engine = self._engine
        while True:
            events = engine.poll()
            if self._wake in events:
                os.eventfd_read(self._wake)
            self._flush()
            if engine.socket in events:
                self._receive()
            if self._closing:
                self._flush()
                return None
            if engine.attached.pidfd in events:
                self._receive()  # messages that the engine sent before it died
                return engine.attached.why_it_died()
            if engine.watch.is_over():
                return engine.end_silent()

    def _flush(self) -> None:
        while self._outgoing:
            self._engine.socket.send_multipart(self._outgoing.popleft())

    def _receive(self) -> None:
        socket = self._engine.socket
        while socket.poll(0):
            frames = socket.recv_multipart()
            try:
                self._handle(wire.decode(frames))
            except wire.NotAMessage as error:  # its sequences are unknown, so all are given up
                self._begin_anew(f"the front end got what is {error}")

    def _handle(self, message: msgspec.Struct) -> None:
        if isinstance(message, Outputs):
            self._call(self._on_outputs, message)
        elif isinstance(message, Stats):
            self._call(self._on_stats, message)
        elif isinstance(message, wire.Received):
            with self._lock:  # what was given up counts no more, but may still be read
                self._unread = max(0, self._unread - message.pixels)
        elif isinstance(message, wire.Refusal):
            self._begin_anew(message.message)
        elif not isinstance(message, wire.Welcome):  # Welcome answers a repeated Hello
            self._begin_anew(f"the engine sent a message of type {type(message).__name__}")

    def _call(self, callback: Callable[[Any], None], message: Any) -> None:
        try:
            callback(message)
        except Exception:  # a failed callback must not end the other streams
            log.exception("a front end's callback failed")

    def _begin_anew(self, why: str) -> None:
        """After an unreadable message: engine and front end drop all its sequences."""
        log.error("every sequence of this front end is given up: %s", why)
        with self._lock:
            self._outgoing.clear()
            self._unread = 0
            self._outgoing.append(_hello())
            os.eventfd_write(self._wake, 1)
        self._call(self._on_lost, why)

    def _rejoin(self, why: str) -> bool:
        """Join or start an engine after one died. False on close() or for a stale front end."""
        self._lose(f"{why}; it is being restarted")
        while not self._closing:
            dead = self._engine
            try:
                self._engine = self._join(again=True)
            except StaleFrontEnd as error:
                self._lose(str(error))
                return False
            except EngineError as error:
                self._lose(str(error))  # before the count: whoever sees the count finds its reason
                self.failed_starts += 1
                log.error("attempt %d to get an engine back: %s", self.failed_starts, error)
                self._pause(RETRY_S[min(self.failed_starts, len(RETRY_S)) - 1])
                continue
            dead.close(0)
            self.failed_starts = 0
            with self._lock:
                self._trouble = None
            log.info("attached to a new engine")
            return True
        return False

    def _pause(self, seconds: float) -> None:
        """Sleep; close() ends the sleep."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if poll.poll(seconds * 1000):
            os.eventfd_read(self._wake)  # written by close(), or for a message that was dropped

    def _lose(self, trouble: str) -> None:
        with self._lock:
            news = self._trouble is None
            self._trouble = trouble
            self._outgoing.clear()
            self._unread = 0
        if news:
            log.warning("%s", trouble)
            self._call(self._on_lost, trouble)

    def _join(self, again: bool) -> _Connection:
        """Attach, then wait until the model is loaded or the engine has failed.

        A recorded engine may end while this front end joins it; then attach() is tried again.
        """
        for _ in range(JOIN_TRIES):
            try:
                attached = attach(self._config, self._scope, self._instance, self._owner_pid, again)
            except OSError as error:
                raise EngineError(str(error)) from error
            engine = _Connection(attached, self._wake)
            why = self._greet(engine)
            if why is None:
                return engine
            ended = wait_end(attached.pidfd, 0.0)
            if attached.child is not None and not again:  # a failed load leaves no process or file
                detach(attached, self._instance, lambda: None, ENDS_S if ended else 0.0)
            engine.close(0)
            if attached.child is not None or not ended:
                break
        raise EngineError(why)

    def _greet(self, engine: _Connection) -> str | None:
        """Send Hello and wait for the answer. Returns why this front end is not attached.

        close() does not wait for the model to load: this returns None then, without an answer.
        """
        engine.socket.send_multipart(_hello())
        while True:
            events = engine.poll()
            if self._wake in events:
                if self._closing:
                    return None
                os.eventfd_read(self._wake)
            if engine.socket in events:
                return self._hear_answer(engine.socket.recv_multipart())
            if engine.attached.pidfd in events:
                return engine.attached.why_it_died()
            if engine.watch.is_over():
                return engine.end_silent()

    def _hear_answer(self, frames: list[bytes]) -> str | None:
        try:
            answer = wire.decode(frames)
        except wire.NotAMessage as error:
            return f"the engine is of another version, its answer is {error}"
        if isinstance(answer, wire.Welcome):
            self.info: ModelInfo = answer.info
            return None
        if isinstance(answer, wire.Refusal):
            return answer.message
        return f"the engine answers with a message of type {type(answer).__name__}"


class _Connection:
    """The socket to one engine process, and what shows that the engine has ended or is silent."""

    def __init__(self, attached: Attached, wake: int) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.hwm = 0
        socket.set(zmq.RECONNECT_IVL, 20)
        heartbeat.send_heartbeats(socket, heartbeat.ENGINE)
        self.attached = attached
        self.socket = socket
        self.watch = heartbeat.ConnectionWatch(socket, OPEN_S, END_S)
        socket.connect(attached.address)
        self._poller = zmq.Poller()
        for source in (socket, self.watch.monitor, attached.pidfd, wake):
            self._poller.register(source, zmq.POLLIN)

    def poll(self) -> dict[Any, int]:
        """Wait for news of the engine, or for `wake`; returns what is readable."""
        return dict(self._poller.poll(self.watch.timeout_ms))

    def end_silent(self) -> str:
        """Kill an engine that is given up; returns the sentence for its streams."""
        if self.watch.connected:
            silence = f"the engine has not answered for {END_S:g} s or more and has not ended"
        else:
            silence = f"the engine has not opened its socket in {OPEN_S:g} s and has not ended"
        return self.attached.end_silent(silence)

    def close(self, linger_ms: int) -> None:
        self.watch.close()
        self.socket.close(linger_ms)
        os.close(self.attached.pidfd)


def _hello() -> list[bytes]:
    return wire.encode(wire.Hello(wire.PROTOCOL, os.getpid()))
