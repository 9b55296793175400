"""How the engine and its workers reach each other: sockets, keys, and what must agree.

On one machine an ipc socket in a private directory. Between machines TCP on the address that was
given, encrypted and authenticated by CURVE with keys that both sides derive from one secret file;
who does not have it gets no word in. Peers that stop answering, stopped or cut off, are noticed by
ZeroMQ's own heartbeats, which need no thread of ours. Knows nothing of steps or models.
"""

from __future__ import annotations

import hashlib
import os
import socket as sockets
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import torch
import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from gllm_engine.config import ConfigError
from gllm_engine.files import open_file, read_file
from gllm_engine.software import software

# bytes
MIN_SECRET = 32
MAX_SECRET = 1 << 16
# A heartbeat every so often; a peer that answers none for so long is lost. Milliseconds.
_HEARTBEAT = 300
LOCAL_TIMEOUT = 1_200
REMOTE_TIMEOUT = 3_000


def rank_software() -> str:
    """What must be the same on all ranks."""
    return f"{software()}, torch {torch.__version__.partition('+')[0]}"


def join_host(host: str, port: int) -> str:
    """HOST:PORT, or [HOST]:PORT of an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host(address: str) -> tuple[str, int]:
    """The host and the port of what `join_host` has made."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def listen_at(host: str, port: int) -> sockets.socket:
    """A TCP socket that listens on that address alone. Raises OSError."""
    family = sockets.AF_INET6 if ":" in host else sockets.AF_INET
    return sockets.create_server((host, port), family=family)


def digest(model: Path) -> str:
    """Of the model's configuration, which must be the same on all ranks. Raises ConfigError."""
    return hashlib.sha256(read_file(model / "config.json", ConfigError)).hexdigest()[:16]


def read_secret(path: Path) -> bytes:
    """The cluster's secret. Raises ConfigError for a file that others may read, or a short one."""
    try:
        with open_file(path, ConfigError) as file:
            secret = file.read(MAX_SECRET).strip()
            mode = os.fstat(file.fileno()).st_mode
    except ConfigError as error:
        raise ConfigError(f"cluster_key_file: {error}") from None
    if mode & 0o077:
        raise ConfigError(f"cluster_key_file: others may read {path}; its mode must be 0600")
    if len(secret) < MIN_SECRET:
        raise ConfigError(
            f"cluster_key_file: {path} holds {len(secret)} bytes, at least {MIN_SECRET} are needed"
        )
    return secret


def _key_pair(secret: bytes, side: bytes) -> tuple[bytes, bytes]:
    """CURVE's public and secret key of one side, as ZeroMQ takes them."""
    own = z85.encode(hashlib.blake2b(secret, digest_size=32, person=side).digest())
    return zmq.curve_public(own), own


def listen(
    context: zmq.Context[zmq.Socket[bytes]], address: str, secret: bytes | None, closing: ExitStack
) -> zmq.Socket[bytes]:
    """The engine's side, bound to `address`; with a secret only its holders can talk to it.

    `closing`: to be closed before the context is.
    """
    socket = context.socket(zmq.ROUTER)
    socket.set(zmq.IPV6, _is_ipv6(address))
    socket.set(zmq.ROUTER_MANDATORY, 1)
    if secret is not None:
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        closing.callback(authenticator.stop)
        # Those are let in who hold the secret: their key follows from it.
        worker, _ = _key_pair(secret, b"worker")
        check = SimpleNamespace(callback=lambda domain, key: key == worker)
        authenticator.configure_curve_callback("*", check)
        socket.curve_publickey, socket.curve_secretkey = _key_pair(secret, b"engine")
        socket.curve_server = True
    _watch_peers(socket, LOCAL_TIMEOUT if secret is None else REMOTE_TIMEOUT)
    socket.bind(address)
    return socket


def connect(
    context: zmq.Context[zmq.Socket[bytes]], address: str, secret: bytes | None
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """A worker's side, and what tells of it from the very beginning; see `await_loss`."""
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.IPV6, _is_ipv6(address))
    if secret is not None:
        socket.curve_publickey, socket.curve_secretkey = _key_pair(secret, b"worker")
        socket.curve_serverkey = _key_pair(secret, b"engine")[0]
    _watch_peers(socket, LOCAL_TIMEOUT if secret is None else REMOTE_TIMEOUT)
    events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
    monitor = socket.get_monitor_socket(events)
    socket.connect(address)
    return socket, monitor


def _is_ipv6(address: str) -> bool:
    return "[" in address


def _watch_peers(socket: zmq.Socket[bytes], timeout: int) -> None:
    socket.hwm = 0
    socket.set(zmq.LINGER, 1000)
    socket.set(zmq.HEARTBEAT_IVL, _HEARTBEAT)
    socket.set(zmq.HEARTBEAT_TIMEOUT, timeout)
    if timeout == REMOTE_TIMEOUT:
        socket.set(zmq.RECONNECT_IVL, 1000)
        # One who tries to reach a machine that has gone does not wait for the system's minutes.
        socket.set(zmq.CONNECT_TIMEOUT, timeout)


def watch(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """A socket that is readable once the connection to a peer has been lost; see `lost`."""
    return socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)


def await_loss(monitor: zmq.Socket[bytes], not_heard: Callable[[], None]) -> None:
    """For a worker: return once the engine that it has reached is lost. Before one is reached,
    `not_heard` is called when one breaks off the greeting, for the first time: it has another
    secret.
    """
    events: set[int] = set()
    while True:
        event = recv_monitor_message(monitor)["event"]
        if event == zmq.EVENT_DISCONNECTED:
            if zmq.EVENT_HANDSHAKE_SUCCEEDED in events:
                return
            if event not in events:
                not_heard()
        events.add(event)


def lost(monitor: zmq.Socket[bytes]) -> bool:
    """Whether a peer was lost since the last call."""
    any_lost = False
    while monitor.poll(0):
        recv_monitor_message(monitor)
        any_lost = True
    return any_lost
