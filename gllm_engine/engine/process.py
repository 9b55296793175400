"""The engine process: one Engine, its front ends on a socket, and the end of its own life.

It ends when the owner (tritonserver) dies, when the last front end has left or died, when the
engine is broken, or, once asked by SIGTERM, when its work is done. Knows nothing of Triton.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq

from gllm_engine import wire
from gllm_engine.arch import ArchError
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.engine.attach import discard_owner
from gllm_engine.engine.core import Engine
from gllm_engine.model import LoadError
from gllm_engine.os_process import Process, end_with
from gllm_engine.types import Stats

STATS_EVERY_S = 0.1
# Nobody attached for so long after the start: whoever started this engine is gone.
LONELY_S = 60.0
# At the end, front ends have so long to take what was sent to them.
LINGER_MS = 5000
# The exit status of a process whose engine is broken.
BROKEN = 70

log = logging.getLogger("gllm.engine")


class EngineProcess:
    """Serves one engine to its front ends. All of it runs on one thread."""

    def __init__(self, engine: Engine, address: str) -> None:
        self.engine = engine
        self.front_ends: dict[bytes, int] = {}  # socket identity -> pidfd
        self.draining = False
        self.deadline = time.monotonic() + LONELY_S
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        # Nothing is dropped: a slow front end is given memory, not loss.
        self.socket.hwm = 0
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        self.socket.bind(address)
        self.poller = zmq.Poller()
        self.poller.register(self.socket, zmq.POLLIN)
        self.stats = _StatsFeed()

    def run(self) -> None:
        """Serve until there is no reason to, or the engine is broken."""
        while self.engine.broken is None and not self._done():
            self._listen(timeout_ms=0 if self.engine.has_work else int(STATS_EVERY_S * 1000))
            self.engine.watch()
            if self.engine.has_work:
                for client, outputs in self.engine.step().items():
                    self._send(client, outputs)
            self._report()
        if self.engine.broken is None:
            log.info("no front end is left or the work is done; the engine ends")

    def close(self) -> None:
        """End the connection once what was sent has been taken: an exit would throw it away."""
        self.socket.close(LINGER_MS)
        self.context.term()

    def _done(self) -> bool:
        if self.draining and not self.engine.has_work:
            return True
        if self.front_ends:
            self.deadline = 0.0  # from now on, the end comes with the last front end
            return False
        return time.monotonic() > self.deadline

    def _listen(self, timeout_ms: int) -> None:
        events = dict(self.poller.poll(timeout_ms))
        while self.socket.get(zmq.EVENTS) & zmq.POLLIN:
            client, *frames = self.socket.recv_multipart()
            try:
                self._handle(client, wire.decode(frames))
            except ValueError:  # one front end's nonsense must not end the others' engine
                log.exception("a front end sent what is not a message; it is dropped")
                self.engine.drop(client)
        for client, pidfd in list(self.front_ends.items()):
            if pidfd in events:
                log.warning("a front end died; its sequences are dropped")
                self._part(client)

    def _handle(self, client: bytes, message: Any) -> None:
        if isinstance(message, wire.Hello):
            self._greet(client, message)
        elif client not in self.front_ends:
            log.warning("message from an unknown front end ignored")
        elif isinstance(message, wire.Submit):
            for request in message.requests:
                self.engine.add(request, client)
        elif isinstance(message, wire.Abort):
            for sequence_id in message.ids:
                self.engine.abort(sequence_id, client)
        elif isinstance(message, wire.Goodbye):
            self._part(client)

    def _greet(self, client: bytes, hello: wire.Hello) -> None:
        if hello.protocol != wire.PROTOCOL:
            self._send(
                client,
                wire.Refusal(
                    f"the front end speaks protocol {hello.protocol}, the engine {wire.PROTOCOL}: "
                    "they are of different versions"
                ),
            )
            return
        try:
            pidfd = os.pidfd_open(hello.pid)
        except ProcessLookupError:
            return
        self.front_ends[client] = pidfd
        self.poller.register(pidfd, zmq.POLLIN)
        self._send(client, wire.Welcome(self.engine.info))

    def _part(self, client: bytes) -> None:
        self.engine.drop(client)
        pidfd = self.front_ends.pop(client)
        self.poller.unregister(pidfd)
        os.close(pidfd)

    def _send(self, client: bytes, message: Any) -> None:
        try:
            self.socket.send_multipart([client, *wire.encode(message)])
        except zmq.ZMQError:  # unroutable: its process has died, which its pidfd will tell
            self.engine.drop(client)

    def _report(self) -> None:
        client = next(iter(self.front_ends), None)
        if client is not None and self.stats.due():
            message = self.stats.make(client, self.engine.stats())
            if message is not None:
                self._send(client, message)


class _StatsFeed:
    """Statistics for one front end at a time, its counters starting at 0 when it is chosen."""

    def __init__(self) -> None:
        self.client: bytes | None = None
        self.base = self.last = Stats()
        self.next = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now < self.next:
            return False
        self.next = now + STATS_EVERY_S
        return True

    def make(self, client: bytes, stats: Stats) -> Stats | None:
        """The message for `client`, or None when nothing changed since its last."""
        if client != self.client:
            # The one before has already counted what was sent to it.
            self.client, self.base = client, self.last
        elif stats == self.last:
            return None
        self.last, base = stats, self.base
        return msgspec.structs.replace(
            stats,
            prefix_queries=stats.prefix_queries - base.prefix_queries,
            prefix_hits=stats.prefix_hits - base.prefix_hits,
            preemptions=stats.preemptions - base.preemptions,
            steps=stats.steps - base.steps,
        )


def _leave_word(directory: Path, sentence: str) -> None:
    """For the front ends. A path in it may be no text, as any bytes can be a file's name."""
    (directory / "error").write_bytes(sentence.encode(errors="backslashreplace"))


def main() -> int:
    """`python -m gllm_engine.engine.process DIRECTORY OWNER_PID`, started by attach.py."""
    directory, owner = Path(sys.argv[1]), Process.of(int(sys.argv[2]))
    if owner is None:
        return 1
    end_with(owner, lambda: discard_owner(owner))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the parent's mask is inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    config = msgspec.json.decode((directory / "config.json").read_bytes(), type=EngineConfig)
    try:
        engine = Engine(config)
        server = EngineProcess(engine, f"ipc://{directory}/engine.sock")
    except Exception as error:  # the last words of a failed start, for the front ends to repeat
        is_theirs = isinstance(error, (ArchError, ConfigError, LoadError))  # and no bug of ours
        log.error("the engine cannot start: %s", error, exc_info=not is_theirs)
        _leave_word(directory, f"the engine cannot start: {error}")
        _clear_away(owner)
        return 1

    def drain(*_: object) -> None:
        server.draining = True

    signal.signal(signal.SIGTERM, drain)
    server.run()
    if engine.broken is not None:
        log.critical("%s; this process ends, a front end starts another", engine.broken)
        with contextlib.suppress(OSError):  # who would have read it has left
            _leave_word(directory, engine.broken)
        server.close()
        _clear_away(owner)
        os._exit(BROKEN)  # an orderly end would call upon the device again
    server.close()
    engine.close()
    _clear_away(owner)
    return 0


def _clear_away(owner: Process) -> None:
    """The last act. When the owner dies its front ends do too, and their end may end this process
    before the thread that watches the owner has removed what was the owner's.
    """
    if not owner.alive:
        discard_owner(owner)


if __name__ == "__main__":
    sys.exit(main())
