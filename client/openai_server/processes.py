"""Several server processes on one port: started, watched, started anew, stopped.

Each has its own socket on the port, among which the kernel spreads the connections. This process
keeps the sockets open, so a process that dies leaves its waiting connections to its successor.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from gllm_client.signals import caught_signals

TICK_S = 0.1  # between two looks for a signal or a process that has ended
RESTART_S = 1.0  # between a process's end and its successor
PR_SET_PDEATHSIG = 1
_STOPS = (signal.SIGTERM, signal.SIGINT)
_LOG = logging.getLogger("gllm.openai")
# Serves at a socket until a signal; the flag is for one process alone, which tells the address.
Run = Callable[[socket.socket, bool], None]


def bind(host: str, port: int, count: int) -> list[socket.socket]:
    """Sockets on one port, of which none listens yet; port 0: a free one. Raises ValueError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sockets: list[socket.socket] = []
    try:
        with socket.create_server((host, port), family=family) as alone:  # no server is there yet
            port = alone.getsockname()[1]
        for _ in range(count):
            sockets.append(socket.socket(family))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sockets[-1].bind((host, port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(f"port {port} on {host} cannot be used ({reason})") from None
    return sockets


def run_processes(sockets: list[socket.socket], run: Run) -> int:
    """Run one process for each socket until all have ended after a signal; returns the status.

    Signals are passed on. A process that ends by itself is started anew.
    """
    with caught_signals(*_STOPS) as signals:
        running = [_start(run, at, number == 0) for number, at in enumerate(sockets)]
        passed_on = 0
        while any(process.is_alive() for process in running):
            wait([process.sentinel for process in running if process.is_alive()], TICK_S)
            if signals.count > passed_on:
                passed_on = signals.count
                for number, process in enumerate(running):
                    sockets[number].close()  # else those of ended processes would take connections
                    process.terminate()
            for number, process in enumerate(running):
                if not process.is_alive() and not passed_on:
                    _LOG.warning(
                        "process %d ended by itself with status %s; starting it anew",
                        process.pid,
                        process.exitcode,
                    )
                    time.sleep(RESTART_S)
                    running[number] = _start(run, sockets[number], False)
    return max(abs(process.exitcode or 0) for process in running)


def _start(run: Run, at: socket.socket, tells: bool) -> BaseProcess:
    """Start a process. Signals wait until the new process can take them."""
    process = get_context("fork").Process(
        target=_serve, args=(run, at, tells, os.getpid()), daemon=True
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    process.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    return process


def _serve(run: Run, at: socket.socket, tells: bool, parent: int) -> None:
    os.setpgid(0, 0)  # Ctrl-C at the terminal signals only the parent, which passes it on
    for number in _STOPS:
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    if os.getppid() == parent:
        run(at, tells)
