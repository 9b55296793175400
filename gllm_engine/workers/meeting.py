"""The engine's end of the connections with workers, or with encoders, and their processes here.

A socket in a private directory is for processes of this machine, which are started here and end
with the engine. Another one, if it is opened, is for those of other machines. Knows nothing of
what the processes do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

from gllm_engine import wire
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.os_process import owned_prefix, remove_orphans
from gllm_engine.socket_directory import socket_parent
from gllm_engine.workers import channel

_MOST_PID = 4194304  # of Linux on 64 bits
# After a disconnect, sending to the lost peer may still succeed for this long.
_DOUBT_S = 0.5
# Processes of this machine are started together. The first must join within FIRST_COMES_S after
# the start, because importing torch from a slow disk takes minutes.
FIRST_COMES_S = 300.0
# While something is awaited of them, they are checked at this interval.
TICK_MS = 100
# A killed process ends within this time: a GPU's memory may take seconds to free. One that does not
# is in a call to a driver or a disk, perhaps for ever.
ENDS_S = 30.0
# The log names those that a start waits for at this interval.
REMIND_S = 10.0

log = logging.getLogger("gllm.group")


class GroupLost(RuntimeError):
    """A worker or an encoder that the engine cannot do without is lost. The message names it."""


class Meeting:
    """Only one thread may use it."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        parent = socket_parent(below=len(f"/{owned_prefix(_MOST_PID)}12345678/engine"))
        remove_orphans(parent)
        self.directory = Path(tempfile.mkdtemp(prefix=owned_prefix(os.getpid()), dir=parent))
        self.address = f"ipc://{self.directory}/engine"  # of the first socket
        self.children: list[subprocess.Popen[bytes]] = []
        self._closing = contextlib.ExitStack()
        self._closing.callback(self._context.destroy, 0)
        self._closing.callback(_end, self.children, self.directory)
        # Kills the processes of this machine. Idempotent; remote ones notice the lost engine.
        self.end = weakref.finalize(self, self._closing.close)
        self.sockets: list[zmq.Socket[bytes]] = []
        self.monitors: list[zmq.Socket[bytes]] = []
        self._poller = zmq.Poller()
        self._doubt_until = 0.0  # on the monotonic clock
        self._add(channel.listen(self._context, self.address, None, self._closing))

    def _add(self, socket: zmq.Socket[bytes]) -> None:
        monitor = channel.watch(socket)
        self.sockets.append(socket)
        self.monitors.append(monitor)
        for source in (socket, monitor):
            self._poller.register(source, zmq.POLLIN)

    def open_to_others(self, config: EngineConfig, port: int, who: str) -> None:
        """Raises ConfigError. `who` joins at this port, for the log."""
        assert config.cluster_key_file is not None and config.master_addr is not None
        secret = channel.read_secret(Path(config.cluster_key_file))
        address = f"tcp://{channel.join_host(config.master_addr, port)}"
        try:
            self._add(channel.listen(self._context, address, secret, self._closing))
        except zmq.ZMQError as error:
            raise ConfigError(f"master_addr: cannot listen on {address} ({error})") from None
        log.info("%s of other nodes join at %s", who, address)

    def start(
        self, module: str, arguments: list[str], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a process that joins at the first socket and ends with this process."""
        command = [sys.executable, "-m", module, "--engine", self.address, *arguments]
        # A new session: the engine alone handles Ctrl-C at the terminal.
        child = subprocess.Popen(
            [*command, "--owner", str(os.getpid())],
            cwd=self.directory,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.children.append(child)
        return child

    def wait(self, timeout_ms: int) -> None:
        """Until something has come, or a peer is lost."""
        self._poller.poll(timeout_ms)

    def receive(
        self, timeout_ms: int
    ) -> Iterator[tuple[zmq.Socket[bytes], bytes, msgspec.Struct | wire.NotAMessage]]:
        """(socket, identity of the sender, message) of what comes within the time."""
        events = dict(self._poller.poll(timeout_ms))
        for socket in self.sockets:
            while socket.poll(0):
                identity, *frames = socket.recv_multipart()
                try:
                    message: msgspec.Struct | wire.NotAMessage = wire.decode(frames)
                except wire.NotAMessage as error:
                    message = error
                yield socket, identity, message
        for monitor in self.monitors:
            if monitor in events and channel.lost(monitor):
                self._doubt_until = time.monotonic() + _DOUBT_S

    @property
    def in_doubt(self) -> bool:
        """Whether a peer was lost lately, so that messages to all must show who it is."""
        return time.monotonic() < self._doubt_until


def refuse(socket: zmq.Socket[bytes], identity: bytes, who: str, problem: str) -> None:
    """Tell a process that it may not join, and the log; `who` it is."""
    log.warning("%s is refused: %s", who, problem)
    with contextlib.suppress(zmq.ZMQError):  # it may have left
        socket.send_multipart([identity, *wire.encode(wire.Refusal(problem))])


def other_protocol(who: str) -> str:
    return f"the {who} speaks another protocol than the engine, which speaks {wire.PROTOCOL}"


def difference(join: wire.Join, role: str, model: str, more: dict[str, tuple[Any, Any]]) -> str:
    """A sentence saying why a process may not join; "" if nothing of this keeps it away.

    `role`: of those who join here. `model`: digest of the engine's. `more`: (expected, got) by what
    the process does with it.
    """
    if join.protocol == wire.PROTOCOL and join.role != role:
        return f"the {join.role[:20]} has come to where only {role}s join"
    checks: dict[str, tuple[Any, Any]] = {
        "speaks protocol": (wire.PROTOCOL, join.protocol),
        "runs": (channel.rank_software(), join.software),
        "has a model whose config.json has digest": (model, join.model),
    }
    return next(
        (
            f"the {role} {what} {got}, the engine expects {expected}"
            for what, (expected, got) in (checks | more).items()
            if got != expected
        ),
        "",
    )


def _end(children: Iterable[subprocess.Popen[bytes]], directory: Path) -> None:
    """Kill all processes of this machine and remove the socket directory.

    SIGKILL also ends processes that are stopped, or blocked waiting for a dead one. One that it
    does not end is not waited for longer than ENDS_S.
    """
    # Removed first: this process may be killed before it reaches the second removal.
    shutil.rmtree(directory, ignore_errors=True)
    for child in children:
        child.kill()
    until = time.monotonic() + ENDS_S
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(0.01)
    if left := [child.pid for child in children if child.poll() is None]:
        log.error("processes %s do not end though they were killed", left)
    shutil.rmtree(directory, ignore_errors=True)  # files that a process created meanwhile
