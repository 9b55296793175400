"""An encoder process: holds the vision tower of a model, and encodes the images it receives.

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

import msgspec
import torch
import zmq
from torch import Tensor

from gllm_engine import wire
from gllm_engine.arch import read_arch
from gllm_engine.runner import Landing, default_threads, dtype_of, encode_blank, pixels_of
from gllm_engine.types import ImagePixels
from gllm_engine.workers import channel
from gllm_engine.workers.build_runner import device_of, load_tower
from gllm_engine.workers.member import Member, add_options, in_a_line, number, run_member

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
    _module = "gllm_engine.encoder"

    def __init__(self, options: argparse.Namespace) -> None:
        options.gpu = number("--gpu", options.gpu)
        self._number = None if options.number is None else number("--number", options.number)
        super().__init__(options)

    def run(self) -> int:
        assigned = self._join()
        try:
            with torch.inference_mode():
                self._load(assigned)
                self._serve()
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
                role="encoder",
            ),
            wire.EncoderAssigned,
        )

    def _load(self, assigned: wire.EncoderAssigned) -> None:
        config = msgspec.structs.replace(assigned.config, model=self._options.model)
        is_local = self._number is not None
        # The threads of a machine are shared by its encoders; one of another machine is alone.
        threads = default_threads(config.encoder_workers if is_local else 1)
        torch.set_num_threads(config.cpu_threads or threads)
        self._device = device_of(config, self._options.gpu)
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self._device)
        self._landings = [Landing.open(handle) for handle in assigned.landings]
        arch = read_arch(Path(config.model))
        self._tower = load_tower(config, arch, dtype_of(assigned.dtype), self._device)
        # A GPU that has too little memory for the largest image shows it now.
        encode_blank(self._tower, config.largest_image if on_gpu else 1, self._device)
        self._synchronize()

    def _serve(self) -> None:
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
                    for answer in self._encode(message.images, message.places):
                        self._send(answer)
                elif not isinstance(message, wire.Ping):
                    kind = type(message).__name__
                    raise RuntimeError(f"the engine sent a {kind}, not images")

    def _encode(
        self, images: list[ImagePixels], places: list[int]
    ) -> list[wire.Encoded | wire.NotEncoded]:
        """If the tower fails on several images, each is tried alone. Raises RuntimeError for a lost
        device.
        """
        try:
            found = self._tower.encode([pixels_of(image, self._device) for image in images])
            return self._deliver(images, places, found)
        except Exception as error:  # whatever the tower makes of an image
            log.exception("images are not encoded")
            kind = type(error).__name__  # the text of an error goes to the log alone
        self._synchronize()
        if len(images) == 1:
            return [wire.NotEncoded(images[0].number, f"the vision tower fails on it ({kind})")]
        return [
            answer
            for image, place in zip(images, places, strict=True)
            for answer in self._encode([image], [place])
        ]

    def _deliver(
        self, images: list[ImagePixels], places: list[int], found: list[Tensor]
    ) -> list[wire.Encoded | wire.NotEncoded]:
        if not self._landings:
            return [
                wire.Encoded(image.number, _bytes_of(embeddings))
                for image, embeddings in zip(images, found, strict=True)
            ]
        for landing in self._landings:
            for place, embeddings in zip(places, found, strict=True):
                landing.write(place, embeddings)
        self._synchronize()
        return [wire.Encoded(image.number) for image in images]

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _send(self, message: msgspec.Struct) -> None:
        self._socket.send_multipart(wire.encode(message))

    def _await_leave(self) -> None:
        while not isinstance(self._receive(), wire.Leave):
            continue


def _bytes_of(embeddings: Tensor) -> bytes:
    return embeddings.cpu().contiguous().view(torch.uint8).numpy().tobytes()
