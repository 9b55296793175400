"""The sockets between the engine and its workers, their keys, and the versions that must agree.

On one machine: an ipc socket in a private directory. Between machines: TCP on the configured
address, encrypted and authenticated by CURVE. Both sides derive the keys from one secret file, and
a peer without the secret cannot connect. Heartbeats detect a peer that is stopped or cut off. Knows
nothing of steps or models.
"""

from __future__ import annotations

import hashlib
import os
import socket as sockets
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from gllm_engine.config import ConfigError
from gllm_engine.files import open_file, read_file
from gllm_engine.heartbeat import LOCAL_WORKER, REMOTE_WORKER, send_heartbeats
from gllm_engine.software import software

# bytes
MIN_SECRET = 32
MAX_SECRET = 1 << 16


def rank_software() -> str:
    """The software versions that must be the same on all ranks."""
    return f"{software()}, torch {version('torch').partition('+')[0]}"


def join_host(host: str, port: int) -> str:
    """HOST:PORT, or [HOST]:PORT for an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host(address: str) -> tuple[str, int]:
    """The host and the port of an address made by `join_host`."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def listen_at(host: str, port: int) -> sockets.socket:
    """A TCP socket that listens on this one address. Raises OSError."""
    family = sockets.AF_INET6 if ":" in host else sockets.AF_INET
    return sockets.create_server((host, port), family=family)


def digest(model: Path) -> str:
    """A digest of the model's config.json, equal on all ranks. Raises ConfigError."""
    return hashlib.sha256(read_file(model / "config.json", ConfigError)).hexdigest()[:16]


def read_secret(path: Path) -> bytes:
    """The cluster's secret. Raises ConfigError if the file is short, or other users may read it."""
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
    """The public and the secret CURVE key of one side, encoded for ZeroMQ."""
    own = z85.encode(hashlib.blake2b(secret, digest_size=32, person=side).digest())
    return zmq.curve_public(own), own


def listen(
    context: zmq.Context[zmq.Socket[bytes]], address: str, secret: bytes | None, closing: ExitStack
) -> zmq.Socket[bytes]:
    """The engine's socket, bound to `address`. With a secret, only its holders can connect.

    `closing`: the caller closes this stack before it closes the context.
    """
    socket = context.socket(zmq.ROUTER)
    socket.set(zmq.IPV6, _is_ipv6(address))
    socket.set(zmq.ROUTER_MANDATORY, 1)
    if secret is not None:
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        closing.callback(authenticator.stop)
        # Only a holder of the secret can derive the workers' key.
        worker, _ = _key_pair(secret, b"worker")
        check = SimpleNamespace(callback=lambda domain, key: key == worker)
        authenticator.configure_curve_callback("*", check)
        socket.curve_publickey, socket.curve_secretkey = _key_pair(secret, b"engine")
        socket.curve_server = True
    _watch_peers(socket, LOCAL_WORKER if secret is None else REMOTE_WORKER)
    socket.bind(address)
    return socket


def connect(
    context: zmq.Context[zmq.Socket[bytes]], address: str, secret: bytes | None
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """A worker's socket and its monitor, opened before the connection starts; see `await_loss`."""
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.IPV6, _is_ipv6(address))
    if secret is not None:
        socket.curve_publickey, socket.curve_secretkey = _key_pair(secret, b"worker")
        socket.curve_serverkey = _key_pair(secret, b"engine")[0]
    _watch_peers(socket, LOCAL_WORKER if secret is None else REMOTE_WORKER)
    events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
    monitor = socket.get_monitor_socket(events)
    socket.connect(address)
    return socket, monitor


def _is_ipv6(address: str) -> bool:
    return "[" in address


def _watch_peers(socket: zmq.Socket[bytes], timeout: int) -> None:
    socket.hwm = 0
    socket.set(zmq.LINGER, 1000)
    send_heartbeats(socket, timeout)
    if timeout == REMOTE_WORKER:
        socket.set(zmq.RECONNECT_IVL, 1000)
        # Without this, a connection to a vanished machine waits minutes for the system's timeout.
        socket.set(zmq.CONNECT_TIMEOUT, timeout)


def watch(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """A monitor socket that is readable once a peer's connection is lost; see `lost`."""
    return socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)


def await_loss(monitor: zmq.Socket[bytes], not_heard: Callable[[], None]) -> None:
    """Block a worker's thread until the engine that it was connected to is lost.

    If a peer ends the handshake before any connection was made, its secret is a different one:
    `not_heard` is then called, once.
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
