"""The watch of a connection ends without blocking, whatever the peer does meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from patience import SOON_S

# The peer ends between the two steps of `close`, and ZeroMQ gets the time to report it. If its
# thread blocked, this process would hold the interpreter's lock for ever, so it is not the test's.
_PEER_ENDS_MEANWHILE = """
import sys, time, zmq
from gllm_engine.heartbeat import ConnectionWatch

with zmq.Context() as theirs, zmq.Context() as ours:
    peer = theirs.socket(zmq.ROUTER)
    peer.bind(sys.argv[1])
    socket = ours.socket(zmq.DEALER)
    watch = ConnectionWatch(socket, first_s=60.0, end_s=60.0)
    socket.connect(sys.argv[1])
    while not watch.connected:
        watch.monitor.poll()
        assert not watch.is_over()

    def then_peer_ends(step):
        def both(self, *arguments):
            step(self, *arguments)
            if self in (socket, watch.monitor) and not peer.closed:
                time.sleep(0.3)  # for the step itself
                close(peer, 0)
                time.sleep(0.3)
        return both

    close = zmq.Socket.close
    zmq.Socket.close = then_peer_ends(close)
    zmq.Socket.disable_monitor = then_peer_ends(zmq.Socket.disable_monitor)
    watch.close()
    assert peer.closed
    socket.close(0)
"""


def test_a_peer_that_ends_while_its_watch_is_closed_blocks_nobody(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PEER_ENDS_MEANWHILE, f"ipc://{tmp_path}/peer.sock"]
    subprocess.run(command, timeout=SOON_S, check=True)
