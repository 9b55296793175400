"""Heartbeats on ZeroMQ sockets: they detect a peer that is stopped or cut off.

ZeroMQ's own threads send and answer heartbeats, so a peer answers also while its Python code is
busy, in a long step or in a load of minutes. A peer without an answer loses its connection.
Knows nothing of messages or processes.
"""

from __future__ import annotations

import math
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

# Milliseconds between heartbeats.
_INTERVAL = 300
# Milliseconds without an answer until a peer counts as lost. A lost worker costs the running
# requests; a lost engine also costs a load of the model, so it gets more time.
LOCAL_WORKER = 1_200
REMOTE_WORKER = 3_000
ENGINE = 5_000


def send_heartbeats(socket: zmq.Socket[bytes], timeout_ms: int) -> None:
    """Close a connection of `socket` whose peer has not answered for `timeout_ms`.

    Must be called before the socket is bound or connected.
    """
    socket.set(zmq.HEARTBEAT_IVL, _INTERVAL)
    socket.set(zmq.HEARTBEAT_TIMEOUT, timeout_ms)


class ConnectionWatch:
    """Tells when the peer of a connecting socket must be given up.

    The peer gets `first_s` seconds until the first connection, and `end_s` seconds to end by itself
    after that connection is lost. A second connection does not count, since the peer has forgotten
    the first. Use it on the socket's thread; create it before the socket connects.

        create ---- first_s ----> given up      lost ---- end_s ----> given up
              \\                                  /
               connected, no limit -------------
    """

    def __init__(self, socket: zmq.Socket[bytes], first_s: float, end_s: float) -> None:
        self._socket = socket
        self._end_s = end_s
        self.connected = False  # whether the first connection has been made
        self._deadline: float | None = time.monotonic() + first_s
        # Readable when the connection has changed; poll it together with the socket.
        self.monitor = socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )

    @property
    def timeout_ms(self) -> int | None:
        """Milliseconds until the deadline, for a poll; None if there is none now."""
        if self._deadline is None:
            return None
        return math.ceil(max(0.0, self._deadline - time.monotonic()) * 1000)

    def is_over(self) -> bool:
        """Whether the peer must be given up now."""
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            if not self.connected and event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected = True
                self._deadline = None
            elif self.connected and self._deadline is None:
                self._deadline = time.monotonic() + self._end_s
        return self._deadline is not None and time.monotonic() >= self._deadline

    def close(self) -> None:
        """Stop watching. Must be called before the socket is closed.

        ZeroMQ's thread blocks for ever when it reports an event to a closed monitor, and with it
        every thread that closes the socket. So the reports are ended first.
        """
        self._socket.disable_monitor()
        self.monitor.close(0)
