"""Encoders and the landings that they write, as an engine and its ranks have them."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import zmq
from odd_tower import ORDINARY
from torch import Tensor
from traced import WAIT_S, wait_for

from gllm_engine import make_config
from gllm_engine.arch import read_arch
from gllm_engine.config import settle
from gllm_engine.runner import Landing
from gllm_engine.types import ImagePixels
from gllm_engine.workers.build_runner import load_tower, memory_of_gpu, weights_dtype
from gllm_engine.workers.encoders import Encoders, Landed


class Hall:
    """`num_ranks`: of the first stage, whose landings are on `device`."""

    def __init__(
        self, model: Path, device: torch.device, num_ranks: int = 2, **config: Any
    ) -> None:
        on_gpu = device.type == "cuda"
        made = make_config({"model": str(model), "device": device.type, **config})
        settled = settle(made, memory_of_gpu(made), 0)
        arch = read_arch(model)
        assert arch.vision is not None
        self.vision = arch.vision
        dtype = weights_dtype(settled, on_gpu)
        self._device = device
        self._tower = load_tower(settled, arch, dtype, device)
        numbers = (1 + arch.vision.num_deep) * arch.vision.out
        make = partial(Landing.make, settled.landing_tokens, numbers, dtype, device)
        self.landings = [make() for _ in range(num_ranks)]
        self._images: dict[int, ImagePixels] = {}
        self.is_exact = False  # what lands has been encoded alone
        self.keeps = False  # what lands
        self.kept: dict[int, int] = {}  # places by number
        self.taken: set[int] = set()  # numbers of those that were right, and whose places are free
        self.sent: list[int] = []  # places of what encoders of other machines have made
        self.refused: dict[int, str] = {}
        handles = [landing.handle for landing in self.landings]
        self.start = partial(Encoders, settled, arch, handles, self._land)
        self.encoders = self.start()

    def __enter__(self) -> Hall:
        return self

    def __exit__(self, *_: object) -> None:
        self.encoders.close()

    def _land(self, place: int, embeddings: bytes) -> None:
        self.sent.append(place)
        for landing in self.landings:
            landing.write(place, embeddings)

    def submit(self, number: int, rows: int = 2, columns: int = 2, fault: int = ORDINARY) -> None:
        side = self.vision.patch * self.vision.merge
        pixels = bytearray(random.Random(number).randbytes(3 * rows * columns * side**2))
        pixels[0] = fault if fault < ORDINARY else max(pixels[0], ORDINARY)
        self._images[number] = ImagePixels(number, rows * side, columns * side, bytes(pixels))
        self.encoders.submit(self._images[number])

    def poll(self) -> None:
        for each in self.encoders.poll():
            assert each.number not in self.kept.keys() | self.taken | self.refused.keys()
            if isinstance(each, Landed):
                self.kept[each.number] = each.place
            else:
                self.refused[each.number] = each.message
        if not self.keeps:
            self.take()

    def take(self) -> None:
        """Check that what has landed is what the tower makes, and release the places."""
        for number, place in self.kept.items():
            expected = self.embeddings(number)
            for landing in self.landings:
                found = landing.read(place, tuple(expected.shape))
                if self.is_exact:
                    assert torch.equal(found, expected), number
                else:  # products of more rows may be rounded otherwise
                    torch.testing.assert_close(found, expected)
        self.encoders.release(self.kept.values())
        self.taken |= self.kept.keys()
        self.kept.clear()

    @torch.inference_mode()
    def embeddings(self, number: int) -> Tensor:
        image = self._images[number]
        pixels = torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 3).to(self._device)
        return self._tower.encode([pixels])[0]

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> None:
        """Until `condition` holds, woken as an engine is."""
        poller = zmq.Poller()
        for socket in self.encoders.sockets():
            poller.register(socket, zmq.POLLIN)

        def step() -> Any:
            poller.poll(100)
            self.poll()
            return condition()

        wait_for(step, what, timeout_s)

    def wait_done(self, timeout_s: float = WAIT_S) -> None:
        """Until there is nothing left to do, and check that nothing is left."""
        encoders = self.encoders
        self.wait(lambda: not encoders._jobs, f"{encoders._jobs.keys()} are done", timeout_s)
        # What nobody wanted is answered too.
        idle = lambda: all(not each.batches for each in encoders._encoders)  # noqa: E731
        self.wait(idle, "encoders are idle", timeout_s)
        self.wait(lambda: not any(slot.places for slot in encoders._slots), "the dead are buried")
        assert not encoders._taken and not encoders._queue

    def pids(self) -> list[int]:
        return [slot.child.pid for slot in self.encoders._slots if slot.child is not None]
