"""A process that joins an engine: a worker or an encoder, on the engine's machine or on another.

When the engine is lost, a process on the engine's machine ends. One on another machine executes
itself again in the same process and waits for the next engine, unless it leaves. This module
does not know what a member does.
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
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NoReturn, TypeVar

import msgspec
import zmq

from gllm_engine import wire
from gllm_engine.config import ConfigError
from gllm_engine.os_process import KILLED_S, Process, end_with, end_with_any_thread
from gllm_engine.workers import channel

_REFUSED = 78  # exit status: os.EX_CONFIG
# A pause before the restart, so that a member that is always refused causes little load.
_REFUSED_PAUSE_S = 5.0

log = logging.getLogger("gllm.member")

_Answer = TypeVar("_Answer", bound=msgspec.Struct)


def run_member(options: argparse.Namespace, make: Callable[[argparse.Namespace], Member]) -> int:
    """What a member's main does. Returns the exit status."""
    if options.owner is not None:
        end_with(Process.of(options.owner), lambda: _clear_away(options.engine))
    end_with_any_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        return make(options).run()
    except (ConfigError, Refused) as error:
        log.error("%s", error)
        if not _is_local(options.engine):
            time.sleep(_REFUSED_PAUSE_S)
        return _REFUSED


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every member."""
    parser.add_argument("--engine", required=True, help="tcp://HOST:PORT of the engine's node")
    parser.add_argument("--model", required=True, help="directory of the checkpoint on this node")
    parser.add_argument("--cluster-key-file", help="the secret that the engine has too")
    parser.add_argument("--owner", type=int, help="pid of a process to end with")


def number(name: str, text: str) -> int:
    """A number of ranks, nodes or GPUs. Raises ConfigError."""
    if not (text.isascii() and text.isdecimal() and len(text) < 5):
        raise ConfigError(f"{name}: {text[:60]!r} is not a whole number from 0 to 9999")
    return int(text)


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _is_local(address: str) -> bool:
    return address.startswith("ipc:")


def _clear_away(address: str) -> None:
    """Remove the socket directory of a local engine, because a killed engine cannot do it."""
    if _is_local(address):
        shutil.rmtree(Path(address.removeprefix("ipc://")).parent, ignore_errors=True)


class Refused(RuntimeError):
    """The engine does not take this process; the message says why."""


class Member:
    """The process's end of the connection; `run` does its work and returns the exit status."""

    _role: ClassVar[str]  # for the log; python -m gllm_engine.ROLE executes it
    _leaves = False  # once told to: then no other engine is waited for

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._secret = None
        if not _is_local(options.engine):
            if options.cluster_key_file is None:
                raise ConfigError("--cluster-key-file: it is needed to join another machine")
            self._secret = channel.read_secret(Path(options.cluster_key_file))
        self._context = zmq.Context()
        self._socket, self._monitor = self._connect()

    def run(self) -> int:
        raise NotImplementedError

    def _greet(self, join: wire.Join, expected: type[_Answer]) -> _Answer:
        """Join the engine; returns its answer. Raises Refused."""
        # The engine reports why it ended; the member only logs the loss.
        threading.Thread(
            target=self._begin_anew_once_lost, name="engine-watch", daemon=True
        ).start()
        self._socket.send_multipart(wire.encode(join))
        try:
            answer = self._receive()
        except wire.NotAMessage as error:
            raise Refused(f"the engine is of another version, its answer is {error}") from None
        if isinstance(answer, wire.Refusal):
            raise Refused(answer.message)
        if not isinstance(answer, expected):
            raise Refused(f"the engine answers with a message of type {type(answer).__name__}")
        return answer

    def _receive(self) -> msgspec.Struct:
        while True:
            message = wire.decode(self._socket.recv_multipart())
            if not isinstance(message, wire.Ping):
                return message

    def _connect(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        return channel.connect(self._context, self._options.engine, self._secret)

    def _not_heard(self) -> None:
        log.warning(
            "%s breaks off the greeting: it is no engine, or its key is not the one in %s; "
            "this %s goes on trying",
            self._options.engine,
            self._options.cluster_key_file,
            self._role,
        )

    def _begin_anew_once_lost(self) -> NoReturn:
        """End or restart this process when the engine is lost; other threads may be blocked."""
        channel.await_loss(self._monitor, self._not_heard)
        if _is_local(self._options.engine):
            # If the engine has died, the thread that watches it clears away and ends this process.
            # If it lives, it ends this process, and its directory is for those that come next.
            time.sleep(KILLED_S)
            os._exit(1)
        if self._leaves:
            os._exit(0)
        log.warning("the engine is lost; this %s waits for another", self._role)
        time.sleep(1)  # other members of this node notice the loss in this time
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2:  # libraries leave their file descriptors inheritable
                with contextlib.suppress(OSError):
                    os.set_inheritable(descriptor, False)
        module = f"gllm_engine.{self._role}"
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])
