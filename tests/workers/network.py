"""Two network namespaces joined by a cable, as two machines: made with nothing but the kernel.

Addresses are 10.77.0.1 and 10.77.0.2. Needs root.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

CABLE = "cable"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_RTM_NEWLINK, _REQUEST_ACK_CREATE_EXCL = 16, 0x1 | 0x4 | 0x400 | 0x200
_IFNAME, _LINKINFO, _NET_NS_PID, _KIND, _DATA, _VETH_PEER = 3, 18, 19, 1, 2, 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8913, 0x8914, 0x8916, 0x891C
_UP = 1


class Node:
    """A network namespace, kept by a sleeping process."""

    def __init__(self, holder: subprocess.Popen[bytes], address: str) -> None:
        self.holder, self.address = holder, address

    @property
    def inside(self) -> list[str]:
        """What to put before a command that is to run on this node."""
        return ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", "--"]

    def run(self, body: Callable[[], T]) -> T:
        """Call `body` on a thread that is on this node."""

        def enter() -> T:
            with open(f"/proc/{self.holder.pid}/ns/net") as namespace:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            return body()

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(enter).result()

    def plug(self, up: bool, interface: str = CABLE) -> None:
        """Switch an interface of this node on or off; its address stays."""

        def switch() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                request = struct.pack("16sH14x", interface.encode(), 0)
                (flags,) = struct.unpack_from("H", _ioctl(any_socket, _SIOCGIFFLAGS, request), 16)
                flags = flags | _UP if up else flags & ~_UP
                _ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", interface.encode(), flags))

        self.run(switch)

    def listening(self) -> set[str]:
        """Addresses on which somebody on this node listens, IPv6 ones in hexadecimal."""
        found = set()
        for table in ("tcp", "tcp6"):
            lines = Path(f"/proc/{self.holder.pid}/net/{table}").read_text().splitlines()[1:]
            for line in lines:
                _, local, _, state = line.split()[:4]
                address = local.partition(":")[0]
                if state == "0A":
                    packed = bytes.fromhex(address)[::-1]
                    found.add(socket.inet_ntoa(packed) if table == "tcp" else address)
        return found


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Raises OSError where namespaces cannot be made."""
    holders = [
        subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 1000"], stdout=-1)
        for _ in ADDRESSES
    ]
    try:
        for holder in holders:
            assert holder.stdout is not None
            if holder.stdout.readline() != b"\n":
                raise OSError("unshare --net fails")
        nodes = [Node(*each) for each in zip(holders, ADDRESSES, strict=True)]
        nodes[0].run(lambda: _lay_cable(holders[1].pid))
        for node in nodes:
            node.run(lambda: _set_address(node.address))  # noqa: B023
            node.plug(True)
            node.plug(True, "lo")
        yield nodes[0], nodes[1]
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def _ioctl(any_socket: socket.socket, number: int, request: bytes) -> bytes:
    return fcntl.ioctl(any_socket, number, request)


def _set_address(address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for number, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, "255.255.255.0")):
            name = CABLE.encode()
            packed = struct.pack("16sHH4s8x", name, socket.AF_INET, 0, socket.inet_aton(value))
            _ioctl(any_socket, number, packed)


def _attribute(kind: int, payload: bytes) -> bytes:
    length = 4 + len(payload)
    return struct.pack("HH", length, kind) + payload + b"\0" * (-length % 4)


def _lay_cable(other_pid: int) -> None:
    """A veth pair, by netlink: one end here, one in the namespace of that process."""
    link, name = bytes(16), _attribute(_IFNAME, CABLE.encode() + b"\0")
    peer = link + name + _attribute(_NET_NS_PID, struct.pack("I", other_pid))
    info = _attribute(_KIND, b"veth") + _attribute(_DATA, _attribute(_VETH_PEER, peer))
    body = link + name + _attribute(_LINKINFO, info)
    header = struct.pack("IHHII", 16 + len(body), _RTM_NEWLINK, _REQUEST_ACK_CREATE_EXCL, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.send(header + body)
        (error,) = struct.unpack_from("i", netlink.recv(4096), 16)
    if error:
        raise OSError(-error, os.strerror(-error))
