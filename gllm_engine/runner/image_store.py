"""The images of a rank of the first stage: their pixels until a plan encodes them, then embeddings.

Plans name images by number, and say when each is encoded and forgotten.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gllm_engine.model import VisionTower
from gllm_engine.ops import ImageRows
from gllm_engine.runner.host_arrays import pixels_of, to_device
from gllm_engine.types import ImagePixels, StepPlan


class ImageStore:
    """By number of the image."""

    def __init__(self, tower: VisionTower, device: torch.device) -> None:
        self._tower = tower
        self._device = device
        self._pixels: dict[int, Tensor] = {}
        self._embeddings: dict[int, Tensor] = {}  # as VisionTower.encode

    def put(self, images: list[ImagePixels]) -> None:
        """Take the pixels of images that the next plan encodes."""
        for image in images:
            self._pixels[image.number] = pixels_of(image, self._device)

    def update(self, plan: StepPlan) -> None:
        """Forget and encode what the plan says."""
        for number in plan.forget:  # after a failed step they may be in either place, or in none
            self._pixels.pop(number, None)
            self._embeddings.pop(number, None)
        if plan.encode:
            found = self._tower.encode([self._pixels.pop(number) for number in plan.encode])
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
