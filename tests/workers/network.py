"""Two network namespaces joined by a cable, as two machines: made with nothing but the kernel.

Needs root.
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
IPV6_ADDRESSES = ("fd77::1", "fd77::2")
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
        """Addresses on which somebody on this node listens."""
        found = set()
        for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            lines = Path(f"/proc/{self.holder.pid}/net/{table}").read_text().splitlines()[1:]
            for line in lines:
                _, local, _, state = line.split()[:4]
                address = local.partition(":")[0]
                if state == "0A":
                    words = [bytes.fromhex(address[i : i + 8]) for i in range(0, len(address), 8)]
                    packed = b"".join(word[::-1] for word in words)
                    found.add(socket.inet_ntop(family, packed))
        return found


@contextmanager
def two_nodes(addresses: tuple[str, str] = ADDRESSES) -> Iterator[tuple[Node, Node]]:
    """Raises OSError where namespaces cannot be made."""
    holders = [
        subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 1000"], stdout=-1)
        for _ in addresses
    ]
    try:
        for holder in holders:
            assert holder.stdout is not None
            if holder.stdout.readline() != b"\n":
                raise OSError("unshare --net fails")
        nodes = [Node(*each) for each in zip(holders, addresses, strict=True)]
        nodes[0].run(lambda: _lay_cable(holders[1].pid))
        set_address = _set_ipv6_address if ":" in addresses[0] else _set_address
        for node in nodes:
            node.run(lambda: set_address(node.address))  # noqa: B023
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


def _set_ipv6_address(address: str) -> None:
    # Else it cannot be used for a second, while duplicates are looked for.
    Path(f"/proc/sys/net/ipv6/conf/{CABLE}/accept_dad").write_text("0")
    request = socket.inet_pton(socket.AF_INET6, address)
    request += struct.pack("Ii", 64, socket.if_nametoindex(CABLE))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as any_socket:
        _ioctl(any_socket, _SIOCSIFADDR, request)


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
