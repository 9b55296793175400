"""An encoder process: has a vision tower (loaded_tower.py) encode the images it receives.

The engine starts the encoders of its own machine; anybody who has the cluster's key starts those of
other machines. An encoder on the engine's machine writes embeddings into the landings of the ranks;
one on another machine sends them to the engine. After SIGTERM it finishes what it has and ends.
Knows nothing of requests, nor of how a process joins (member.py).
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket as sockets
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from gllm_engine import wire
from gllm_engine.workers import channel
from gllm_engine.workers.member import Member, add_options, in_a_line, number, run_member

if TYPE_CHECKING:
    from gllm_engine.workers.loaded_tower import LoadedTower

log = logging.getLogger("gllm.encoder")


def main(arguments: list[str] | None = None) -> int:
    """`python -m gllm_engine.encoder`; see docs in --help."""
    return run_member(_parser().parse_args(arguments), _Encoder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gllm_engine.encoder",
        description="Encodes images for an engine of another machine, on one GPU of this one.",
    )
    add_options(parser)
    parser.add_argument("--gpu", default="0", help="index of the GPU, where there are GPUs")
    parser.add_argument("--number", help="of an encoder that the engine has started")
    return parser


class _Encoder(Member):
    _role = "encoder"

    def __init__(self, options: argparse.Namespace) -> None:
        options.gpu = number("--gpu", options.gpu)
        self._number = None if options.number is None else number("--number", options.number)
        super().__init__(options)

    def run(self) -> int:
        assigned = self._join()
        try:
            self._serve(self._load(assigned))
        except Exception as error:  # any error caused by a checkpoint or a device
            log.exception("the encoder fails")
            self._send(wire.Failed(-1 if self._number is None else self._number, in_a_line(error)))
            self._await_leave()
            return 1
        return 0

    def _join(self) -> wire.EncoderAssigned:
        is_local = self._number is not None
        return self._greet(
            wire.Join(
                protocol=wire.PROTOCOL,
                software=channel.rank_software(),
                model=channel.digest(Path(self._options.model)),
                node=0 if is_local else 1,
                nnodes=0,
                local_rank=self._number or 0,
                local_size=0,
                role=self._role,
            ),
            wire.EncoderAssigned,
        )

    def _load(self, assigned: wire.EncoderAssigned) -> LoadedTower:
        # Imports torch, which takes minutes from a slow disk: late, because the heartbeats of a
        # process that has joined tell that it lives.
        from gllm_engine.workers.loaded_tower import LoadedTower

        config = msgspec.structs.replace(assigned.config, model=self._options.model)
        # The threads of a machine are shared by its encoders; one of another machine is alone.
        num_encoders = 1 if self._number is None else config.encoder_workers
        gpu = self._options.gpu
        return LoadedTower(config, assigned.dtype, assigned.landings, gpu, num_encoders)

    def _serve(self, tower: LoadedTower) -> None:
        """Encode images until the engine lets this process leave, which SIGTERM asks for."""
        woken, waker = sockets.socketpair()
        for end in (woken, waker):
            end.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(woken, zmq.POLLIN)
        self._send(wire.EncoderReady())
        while True:
            events = dict(poller.poll())
            if woken.fileno() in events:
                woken.recv(1)
                self._leaves = True
                log.info("this encoder leaves; it finishes the images that it has")
                self._send(wire.Leave())
            while self._socket.poll(0):
                message = wire.decode(self._socket.recv_multipart())
                if isinstance(message, wire.Leave):
                    return
                if isinstance(message, wire.Encode):
                    for answer in tower.encode(message.images, message.places):
                        self._send(answer)
                elif not isinstance(message, wire.Ping):
                    kind = type(message).__name__
                    raise RuntimeError(f"the engine sent a {kind}, not images")

    def _send(self, message: msgspec.Struct) -> None:
        self._socket.send_multipart(wire.encode(message))

    def _await_leave(self) -> None:
        while not isinstance(self._receive(), wire.Leave):
            continue
