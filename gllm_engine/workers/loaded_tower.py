"""What an encoder computes with: the vision tower of a model, and the landings that it writes.

Knows nothing of sockets, nor of who asks for images.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from gllm_engine import wire
from gllm_engine.arch import read_arch
from gllm_engine.config import EngineConfig
from gllm_engine.runner import Landing, default_threads, dtype_of, encode_blank, pixels_of
from gllm_engine.types import ImagePixels, LandingHandle
from gllm_engine.workers.build_runner import device_of, load_tower

log = logging.getLogger("gllm.encoder")


class LoadedTower:
    """Without `landings` the answers have the embeddings in them."""

    @torch.inference_mode()
    def __init__(
        self,
        config: EngineConfig,
        dtype: str,
        landings: list[LandingHandle],
        gpu: int,
        num_encoders: int,
    ) -> None:
        """`gpu`: its index, where there are GPUs. `num_encoders`: share the threads of a CPU.

        Raises ConfigError, LoadError, and any error of the device or of a landing.
        """
        torch.set_num_threads(config.cpu_threads or default_threads(num_encoders))
        self._device = device_of(config, gpu)
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self._device)
        self._landings = [Landing.open(handle) for handle in landings]
        arch = read_arch(Path(config.model))
        self._tower = load_tower(config, arch, dtype_of(dtype), self._device)
        # A GPU that has too little memory for the largest image shows it now.
        encode_blank(self._tower, config.largest_image if on_gpu else 1, self._device)
        self._synchronize()

    @torch.inference_mode()
    def encode(
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
            for answer in self.encode([image], [place])
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


def _bytes_of(embeddings: Tensor) -> bytes:
    return embeddings.cpu().contiguous().view(torch.uint8).numpy().tobytes()
