"""The engine process: serves one Engine to its front ends over a socket.

The process ends when the owner (tritonserver) dies, when the last front end has left or died, when
the engine is broken, or after SIGTERM once all sequences are done. Knows nothing of Triton.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import zmq

from gllm_engine import wire
from gllm_engine.arch import ArchError, LoadError
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.engine.attach import socket_address
from gllm_engine.engine.core import Engine
from gllm_engine.os_process import Process, end_with, end_with_any_thread
from gllm_engine.types import Stats, TenantStats

STATS_EVERY_S = 0.1
# An engine ends if no front end attaches in this time: the front end that started it is gone.
LONELY_S = 60.0
# An engine checks its bookkeeping once after it has been idle for so long: a check takes some
# milliseconds, which a request should not wait for.
IDLE_S = 1.0
# At the end, the engine waits at most this long for front ends to receive its messages.
LINGER_MS = 5000
# The exit status of a process whose engine is broken.
BROKEN = 70

log = logging.getLogger("gllm.engine")


class EngineProcess:
    """Serves one engine to its front ends. Runs on one thread."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes]) -> None:
        self.engine = engine
        self.front_ends: dict[bytes, int] = {}  # socket identity -> pidfd
        self.draining = False
        self.deadline = time.monotonic() + LONELY_S
        self.socket = socket
        self.poller = zmq.Poller()
        for source in (self.socket, *engine.sockets()):
            self.poller.register(source, zmq.POLLIN)
        self.stats = _StatsFeed()
        # When the engine last had work; None if its bookkeeping has been checked since then.
        self.busy_until: float | None = None

    def run(self) -> None:
        """Serve until the engine is broken or `_done()` is true.

        Raises IntegrityError if the engine's bookkeeping is found wrong while it is idle.
        """
        while self.engine.broken is None and not self._done():
            has_step = self.engine.has_work and not self.engine.awaits_images
            self._listen(timeout_ms=0 if has_step else int(STATS_EVERY_S * 1000))
            if self.engine.has_work:
                self.busy_until = time.monotonic()
                for client, outputs in self.engine.step().items():
                    self._send(client, outputs)
            else:
                self.engine.watch()
                if self.busy_until is not None and time.monotonic() > self.busy_until + IDLE_S:
                    self.engine.check_integrity()
                    self.busy_until = None
            self._report()
        if self.engine.broken is None:
            log.info("no front end is left or the work is done; the engine ends")

    def _done(self) -> bool:
        if self.draining and not self.engine.has_work:
            return True
        if self.front_ends:
            self.deadline = 0.0  # from now on, the process ends with its last front end
            return False
        return time.monotonic() > self.deadline

    def _listen(self, timeout_ms: int) -> None:
        events = dict(self.poller.poll(timeout_ms))
        while self.socket.poll(0):
            client, *frames = self.socket.recv_multipart()
            try:
                self._handle(client, wire.decode(frames))
            except wire.NotAMessage as error:  # must not end the engine for other front ends
                self._refuse(client, error)
        for client, pidfd in list(self.front_ends.items()):
            if pidfd in events:
                log.warning("a front end died; its sequences are dropped")
                self._part(client)

    def _handle(self, client: bytes, message: msgspec.Struct) -> None:
        if isinstance(message, wire.Hello):
            self._greet(client, message)
        elif client not in self.front_ends:
            self._send(client, wire.Refusal("a message came from a front end that is not attached"))
        elif isinstance(message, wire.Submit):
            for request in message.whole():
                self.engine.add(request, client)
            if message.size:
                self._send(client, wire.Received(message.size))
        elif isinstance(message, wire.Abort):
            for sequence_id in message.ids:
                self.engine.abort(sequence_id, client)
        elif isinstance(message, wire.Goodbye):
            self._part(client)

    def _greet(self, client: bytes, hello: wire.Hello) -> None:
        if hello.protocol != wire.PROTOCOL:
            self._send(client, _different_versions(hello.protocol))
            return
        if client in self.front_ends:  # a repeated Hello drops the front end's sequences
            self.engine.drop(client)
        else:
            try:
                pidfd = os.pidfd_open(hello.pid)
            except OSError as error:
                self._send(client, wire.Refusal(f"process {hello.pid}: {error.strerror}"))
                return
            self.front_ends[client] = pidfd
            self.poller.register(pidfd, zmq.POLLIN)
        self._send(client, wire.Welcome(self.engine.info))

    def _refuse(self, client: bytes, error: wire.NotAMessage) -> None:
        """Answer an unreadable message. Its sequences are unknown, so drop all of its front end."""
        log.error("a front end's sequences are dropped, because what it sent is %s", error)
        self.engine.drop(client)
        if error.kind is wire.Hello:
            self._send(client, _different_versions("another"))
        else:
            self._send(client, wire.Refusal(f"the engine got what is {error}"))

    def _part(self, client: bytes) -> None:
        self.engine.drop(client)
        pidfd = self.front_ends.pop(client)
        self.poller.unregister(pidfd)
        os.close(pidfd)

    def _send(self, client: bytes, message: msgspec.Struct) -> None:
        try:
            self.socket.send_multipart([client, *wire.encode(message)])
        except zmq.ZMQError:  # unroutable: the front end has died; its pidfd reports that next
            self.engine.drop(client)

    def _report(self) -> None:
        client = next(iter(self.front_ends), None)
        if client is not None and self.stats.due():
            message = self.stats.make(client, self.engine.stats())
            if message is not None:
                self._send(client, message)


def listen(address: str) -> zmq.Socket[bytes]:
    """The engine's socket. It answers the heartbeats of front ends, whatever the caller does."""
    socket = zmq.Context().socket(zmq.ROUTER)
    # No message is dropped: the queue of a slow front end grows without a limit.
    socket.hwm = 0
    socket.set(zmq.ROUTER_MANDATORY, 1)
    socket.bind(address)
    return socket


def close(socket: zmq.Socket[bytes]) -> None:
    """Close the socket after front ends have received their messages; exit would drop them.

    Front ends kill a process that does not end soon after this.
    """
    socket.close(LINGER_MS)
    socket.context.term()


def _different_versions(protocol: str) -> wire.Refusal:
    return wire.Refusal(
        f"the front end speaks protocol {protocol}, the engine {wire.PROTOCOL}: they are of "
        "different versions; load the model anew"
    )


class _StatsFeed:
    """Sends statistics to one front end at a time, with counters from 0 since it was chosen."""

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
        """The message for `client`, or None if the statistics have not changed."""
        if client != self.client:
            # The previous front end has already counted the statistics that it received.
            self.client = client
            self.base = self.last
        elif stats == self.last:
            return None
        self.last = stats
        base = self.base
        return msgspec.structs.replace(
            stats,
            prefix_queries=stats.prefix_queries - base.prefix_queries,
            prefix_hits=stats.prefix_hits - base.prefix_hits,
            prefix_stored=stats.prefix_stored - base.prefix_stored,
            prompt_snapshot_hits=stats.prompt_snapshot_hits - base.prompt_snapshot_hits,
            branch_snapshot_hits=stats.branch_snapshot_hits - base.branch_snapshot_hits,
            answer_snapshot_hits=stats.answer_snapshot_hits - base.answer_snapshot_hits,
            preemptions=stats.preemptions - base.preemptions,
            steps=stats.steps - base.steps,
            images_encoded=stats.images_encoded - base.images_encoded,
            image_hits=stats.image_hits - base.image_hits,
            tenants={
                name: _tenant_since(tenant, base.tenants.get(name, TenantStats()))
                for name, tenant in stats.tenants.items()
            },
        )


def _tenant_since(stats: TenantStats, base: TenantStats) -> TenantStats:
    return msgspec.structs.replace(
        stats,
        prefill_tokens=stats.prefill_tokens - base.prefill_tokens,
        decode_tokens=stats.decode_tokens - base.decode_tokens,
    )


def _leave_word(directory: Path, sentence: str) -> None:
    """Write the error file that front ends read. A path in `sentence` may be no valid UTF-8."""
    (directory / "error").write_bytes(sentence.encode(errors="backslashreplace"))


def main() -> int:
    """`python -m gllm_engine.engine.process DIRECTORY OWNER_PID`, started by attach.py."""
    directory = Path(sys.argv[1])
    owners = directory.parents[1]  # see attach.py
    owner = Process.of(int(sys.argv[2]))
    if owner is None:
        shutil.rmtree(owners, ignore_errors=True)
        return 1
    tempfile.tempdir = str(directory)  # whoever removes this directory also removes what is in it
    end_with(owner, lambda: shutil.rmtree(owners, ignore_errors=True))
    end_with_any_thread()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the parent's mask is inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        # Before the load, which takes minutes: from now on front ends see that this process runs.
        socket = listen(socket_address(directory))
    except zmq.ZMQError as error:
        return _give_up(directory, owner, error)
    try:
        config = msgspec.json.decode((directory / "config.json").read_bytes(), type=EngineConfig)
        engine = Engine(config)
        # Loaded objects live as long as the process, so the garbage collector need not scan them.
        gc.collect()
        gc.freeze()
    except Exception as error:
        close(socket)
        return _give_up(directory, owner, error)
    server = EngineProcess(engine, socket)

    def drain(*_: object) -> None:
        server.draining = True

    signal.signal(signal.SIGTERM, drain)  # before, SIGTERM ends the start at once
    trouble = _run(server)
    if trouble is not None:
        log.critical("%s; this process ends, a front end starts another", trouble)
        with contextlib.suppress(OSError):  # the directory is gone if all front ends have left
            _leave_word(directory, trouble)
        close(socket)
        _clear_away(owner, owners)
        os._exit(BROKEN)  # a normal exit would call the failed device again
    engine.close()
    _clear_away(owner, owners)
    close(socket)
    return 0


def _give_up(directory: Path, owner: Process, error: Exception) -> int:
    """Leave the sentence that front ends report; returns the exit status."""
    is_theirs = isinstance(error, (ArchError, ConfigError, LoadError))  # not a bug of ours
    log.error("the engine cannot start: %s", error, exc_info=not is_theirs)
    _leave_word(directory, f"the engine cannot start: {error}")
    _clear_away(owner, directory.parents[1])
    return 1


def _run(server: EngineProcess) -> str | None:
    """Serve until the end. Returns the reason if the engine broke, else None."""
    try:
        server.run()
    except Exception as error:
        log.exception("the engine fails outside a step")
        return f"the engine failed ({type(error).__name__}: {error})"
    return server.engine.broken


def _clear_away(owner: Process, directory: Path) -> None:
    """Remove the directory of a dead owner. The front ends die with the owner, and their end may
    end this process before the thread that watches the owner has removed the directory.
    """
    if not owner.alive:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
