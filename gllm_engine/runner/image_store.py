"""The images of a rank of the first stage: their pixels until a plan encodes them, then embeddings.

Plans name images by number, and say when each is encoded and forgotten. If encoders make the
embeddings, they lie in the landing until a plan fetches them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gllm_engine.model import VisionTower
from gllm_engine.ops import ImageRows
from gllm_engine.runner.host_arrays import pixels_of, to_device
from gllm_engine.runner.landing import Landing
from gllm_engine.types import ImagePixels, StepPlan


class ImageStore:
    """By number of the image. `source`: whence the embeddings are."""

    def __init__(self, source: VisionTower | Landing, dim: int, device: torch.device) -> None:
        """`dim`: of an embedding."""
        self._source = source
        self._dim = dim
        self._device = device
        self._pixels: dict[int, Tensor] = {}
        self._embeddings: dict[int, Tensor] = {}  # as VisionTower.encode

    def put(self, images: list[ImagePixels]) -> None:
        """Take the pixels of images that the next plan encodes."""
        for image in images:
            self._pixels[image.number] = pixels_of(image, self._device)

    def update(self, plan: StepPlan) -> None:
        """Forget, and encode or fetch, what the plan says."""
        for number in plan.forget:  # after a failed step they may be in either place, or in none
            self._pixels.pop(number, None)
            self._embeddings.pop(number, None)
        if isinstance(self._source, Landing):
            depth = self._source.handle.numbers // self._dim
            for image in plan.arrived:
                landed = self._source.read(image.place, (depth, image.tokens, self._dim))
                self._embeddings[image.number] = landed.clone()
        elif plan.encode:
            found = self._source.encode([self._pixels.pop(number) for number in plan.encode])
            self._embeddings |= zip(plan.encode, found, strict=True)

    def rows(self, plan: StepPlan) -> ImageRows | None:
        """The tokens of a step whose embeddings are those of images, if there are any."""
        index = []
        parts = []
        start = len(plan.decode_slots)
        for chunk in plan.chunks:
            for run in chunk.images:
                index.append(start + run.offset + np.arange(run.count))
                parts.append(self._embeddings[run.image][:, run.first : run.first + run.count])
            start += len(chunk.tokens)
        if not parts:
            return None
        (there,) = to_device(self._device, np.concatenate(index))
        return ImageRows(there, torch.cat(parts, 1))
