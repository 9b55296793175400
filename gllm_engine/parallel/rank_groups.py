"""The torch.distributed process groups that connect one rank to the other ranks.

This module creates the groups. Every rank creates all groups in the same order, which
torch.distributed requires.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gllm_engine.parallel.mailbox import can_reach, open_mailbox
from gllm_engine.parallel.mesh import Mesh
from gllm_engine.parallel.pipe import GroupLink, Link, Pipe
from gllm_engine.parallel.tensor_parallel import TensorParallel

# Timeout of a collective. It is long because loading weights can delay a rank. The engine detects
# lost ranks by other means, and much sooner.
_PATIENCE = timedelta(minutes=30)
_NCCL = {
    # Each two-rank group sends in one direction only, so serialized transfers cost nothing.
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",
    # A process that crashes during NVLink multicast can put the host's GPUs out of service.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
# Bytes of a place of a mailbox: for activations, and for the tokens of a step.
_ACTIVATION_PLACE = 16 << 20
_TOKEN_PLACE = 64 << 10
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")  # Linux: one address per line, first in hexadecimal


@dataclass(frozen=True)
class RankGroups:
    """This rank's communicators: `tensor` to the ranks of its stage, `pipe` to other stages.

    `leads_node`: whether this is the first rank of its node. `neighbours`: by stage, the groups
    with the ranks of the same number in the previous and the next stage, if they exist.
    """

    mesh: Mesh
    rank: int
    tensor: TensorParallel
    pipe: Pipe
    leads_node: bool
    neighbours: dict[int, dist.ProcessGroup | None]

    @property
    def stage(self) -> int:
        return self.mesh.stage(self.rank)

    @property
    def reports(self) -> bool:
        """Whether this rank reports the sampled tokens to the engine."""
        return self.rank == self.mesh.rank_at(self.mesh.pp - 1, 0)

    def send(self, x: Tensor, stage: int) -> None:
        """Send x to this rank's neighbour in a stage, after all that the pipe has sent there."""
        peer = self.mesh.rank_at(stage, self.tensor.rank)
        # As bytes, because gloo has not all types of numbers.
        dist.send(x.contiguous().view(torch.uint8), peer, self.neighbours[stage])

    def receive(self, x: Tensor, stage: int) -> None:
        """Fill x with what this rank's neighbour in a stage sends."""
        peer = self.mesh.rank_at(stage, self.tensor.rank)
        received = x.contiguous()
        dist.recv(received.view(torch.uint8), peer, self.neighbours[stage])
        if received is not x:
            x.copy_(received)

    def min_over_ranks(self, number: int) -> int:
        """The minimum of `number` over all ranks."""
        smallest = torch.tensor(number, device=self.tensor.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def broadcast(self, numbers: list[float]) -> list[float]:
        """Rank 0's numbers, returned on every rank. All ranks must pass lists of equal length."""
        shared = torch.tensor(numbers, dtype=torch.float64, device=self.tensor.device)
        dist.broadcast(shared, 0)
        return [float(number) for number in shared.tolist()]


def join_ranks(
    mesh: Mesh, rank: int, per_node: int, store: dist.Store, device: torch.device
) -> RankGroups:
    """Create this rank's process groups. Blocks until all ranks have joined.

    `store`: shared by all ranks. `per_node`: ranks on one node; their numbers are consecutive.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        for name, value in _NCCL.items():
            os.environ.setdefault(name, value)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=mesh.world,
        timeout=_PATIENCE,
        device_id=device if device.type == "cuda" else None,
    )
    stages = [
        dist.new_group([mesh.rank_at(stage, i) for i in range(mesh.tp)]) for stage in range(mesh.pp)
    ]
    # Transfers on one communicator run in order, and two ranks may send to each other at the same
    # time. So tokens, which go back, use other communicators than activations, which go forward.
    forward = {
        (stage, i): dist.new_group([mesh.rank_at(stage, i), mesh.rank_at(stage + 1, i)])
        for stage in range(mesh.pp - 1)
        for i in range(mesh.tp)
    }
    back = [
        dist.new_group([mesh.rank_at(0, i), mesh.rank_at(mesh.pp - 1, i)]) if mesh.pp > 1 else None
        for i in range(mesh.tp)
    ]
    stage = mesh.stage(rank)
    i = mesh.tp_rank(rank)
    nodes = {mesh.rank_at(stage, i) // per_node for i in range(mesh.tp)}
    group = stages[stage] if mesh.tp > 1 else None
    tensor = TensorParallel(i, mesh.tp, device, group, same_node=len(nodes) == 1)
    uses_mailboxes = device.type == "cuda" and _all_can_reach(device)

    def link(group: dist.ProcessGroup | None, to_stage: int, place_bytes: int) -> Link | None:
        """Both ranks of the group open their link to each other here."""
        if group is None or not 0 <= to_stage < mesh.pp:
            return None
        peer = mesh.rank_at(to_stage, i)
        if uses_mailboxes and peer // per_node == rank // per_node:
            return open_mailbox(group, place_bytes, device)
        return GroupLink(peer, group)

    # Every rank opens its links in the order of the stages, so that ranks never wait in a circle.
    near = {other: forward.get((min(other, stage), i)) for other in (stage - 1, stage + 1)}
    before = link(near[stage - 1], stage - 1, _ACTIVATION_PLACE)
    after = link(near[stage + 1], stage + 1, _ACTIVATION_PLACE)
    ends = {0: mesh.pp - 1, mesh.pp - 1: 0}
    returns = link(back[i], ends.get(stage, -1), _TOKEN_PLACE)
    pipe = Pipe(stage, mesh.pp, before, after, returns)
    return RankGroups(mesh, rank, tensor, pipe, rank % per_node == 0, near)


def _all_can_reach(device: torch.device) -> bool:
    """Whether all ranks can write to the memory of the GPUs of their nodes."""
    is_allowed = os.environ.get("NCCL_P2P_DISABLE", "0") == "0"
    can = torch.tensor(int(is_allowed and can_reach(device)), device=device)
    dist.all_reduce(can, dist.ReduceOp.MIN)
    return bool(can)


def talk_through(host: str) -> None:
    """Restrict gloo and NCCL to the network interface that leads to `host`.

    Call this before join_ranks. Environment variables that the user has set are kept.
    """
    is_ipv6 = ":" in host
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own = socket.inet_pton(family, probe.getsockname()[0])
        for name, address in _ipv6_addresses() if is_ipv6 else _ipv4_addresses(probe):
            if address == own:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    if is_ipv6:
        os.environ.setdefault("NCCL_SOCKET_FAMILY", "AF_INET6")


def _ipv4_addresses(any_socket: socket.socket) -> Iterator[tuple[str, bytes]]:
    """(name, address) of each network interface of this machine that has an IPv4 address."""
    for _, name in socket.if_nameindex():
        request = struct.pack("256s", name.encode()[:15])
        try:
            yield name, fcntl.ioctl(any_socket, _SIOCGIFADDR, request)[20:24]
        except OSError:  # an interface without an address
            continue


def _ipv6_addresses() -> Iterator[tuple[str, bytes]]:
    for line in _IPV6_ADDRESSES.read_text().splitlines():
        address, *_, name = line.split()
        yield name, bytes.fromhex(address)
