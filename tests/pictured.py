"""Requests with images for tiny models, and what an engine makes of them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from hashlib import blake2b
from itertools import count
from math import prod
from typing import Any

import pytest
import torch
from clips import transformers_processor
from fake_encoders import FakeEncoders
from torch import Tensor

from gllm_engine.arch import Model
from gllm_engine.arch.vision import Vision
from gllm_engine.config import EngineConfig
from gllm_engine.engine.core import Engine
from gllm_engine.runner import pixels_of
from gllm_engine.sampling import SamplingParams
from gllm_engine.sched import image_end
from gllm_engine.types import Image, ImagePixels, Request, TokenLogprobs
from gllm_engine.workers.build_runner import load_tower
from gllm_engine.workers.encoders import Landed, NotLanded

_IDS = count(1)
# Of a text; or the name, rows and columns of an image, with the number of moments of a video.
Part = int | tuple[str, int, int] | tuple[str, int, int, int]
VIDEO_TOKEN = 6
# Positions of time between moments of a video of Qwen2.5-VL, by default. So few that text goes on
# after the largest column, as it always does in transformers.
INTERVAL = 1
Tokens = list[tuple[int, float]]  # ids and their log probabilities


def request(vision: Vision, *parts: Part, interval: int = INTERVAL, **sampling: Any) -> Request:
    """A greedy request. Texts of equal length are equal, images of equal name and size are."""
    prompt: list[int] = []
    images = []
    side = vision.patch * vision.merge
    for part in parts:
        if isinstance(part, int):
            prompt += random.Random(part).choices(range(10, 380), k=part)
            continue
        name, rows, columns, *moments = part
        shape = (rows * side, columns * side)
        for number in range(moments[0] if moments else 1):
            size = 3 * shape[0] * shape[1] * (2 if moments else 1)
            pixels = random.Random(f"{name} {number} {part}").randbytes(size)
            digest = blake2b(pixels, digest_size=16).digest()
            time = None
            if number and has_times(vision):
                time = interval * number
            elif moments:
                prompt += [30, 31 + number]  # in place of a text that tells the time
            images.append(Image(digest, len(prompt), rows, columns, columns, *shape, pixels, time))
            token = VIDEO_TOKEN if moments else vision.image_token
            prompt += [token] * (rows * columns)
    values = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "logprobs": 0} | sampling
    return Request(next(_IDS), prompt, SamplingParams(**values), 0, images=tuple(images))


def has_times(vision: Vision) -> bool:
    """Whether moments of videos follow each other, which is so for Qwen2.5-VL."""
    return bool(vision.window)


def run(engine: Engine, requests: Iterable[Request]) -> list[Tokens]:
    """The output of each request, all of which come at once; with prompt_logprobs the prompt's
    tokens from the second on come first.
    """
    ids = []
    found: dict[int, Tokens] = {}
    prompts: dict[int, list[TokenLogprobs]] = {}
    finished = {}
    for each in requests:
        engine.add(each)
        ids.append(each.id)
    while engine.has_work:
        for outputs in engine.step().values():
            for id, token in zip(outputs.ids, outputs.tokens, strict=True):
                scored = outputs.logprobs[id]
                found.setdefault(id, []).append((token, scored.logprobs[0]))
            for id, entries in outputs.prompt_logprobs.items():
                prompts.setdefault(id, []).extend(entries)
            finished |= outputs.finished
        engine.check_integrity()
    assert all(finished[id].status is None for id in ids), finished
    for id, entries in prompts.items():
        found[id] = [(e.token_ids[0], e.logprobs[0]) for e in entries] + found[id]
    return [found[id] for id in ids]


class TowerEncoders(FakeEncoders):
    """Encoders in this process. Whenever the engine asks for news, a random one of the images that
    they have has landed, or none; `stopped`: none ever.
    """

    def __init__(self, config: EngineConfig, arch: Model, runner: Any) -> None:
        tower = load_tower(config, arch, torch.float32, torch.device("cpu"))

        @torch.inference_mode()
        def write(place: int, image: ImagePixels) -> None:
            (embeddings,) = tower.encode([pixels_of(image, torch.device("cpu"))])
            runner.land(place, embeddings.numpy().tobytes())

        assert arch.vision is not None
        grid = arch.vision.grid
        super().__init__(
            config.landing_tokens, lambda image: prod(grid(image.height, image.width)), write
        )
        self._random = random.Random(5)
        self.stopped = False

    def poll(self) -> list[Landed | NotLanded]:
        if not self.stopped and self._random.random() < 0.6:
            self.land(self._random.randrange(10))
        return super().poll()


def compare(found: list[Tokens], expected: list[Tokens]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        assert [p for _, p in ours] == pytest.approx([p for _, p in theirs], abs=2e-4)


def processed(images: list[Tensor], vision: Vision) -> dict[str, Tensor]:
    """The inputs that transformers' processor of Qwen makes of images that have the right size."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=vision.patch,
        merge_size=vision.merge,
        temporal_patch_size=vision.frames,
        image_mean=list(vision.mean),
        image_std=list(vision.std),
        do_resize=False,
    )
    return processor(images=[image.numpy() for image in images], return_tensors="pt")


def processed_videos(videos: list[Tensor], vision: Vision, interval: int) -> dict[str, Tensor]:
    """The same of videos, uint8 [frames, height, width, 3], and the time between two moments."""
    processor = transformers_processor("qwen3_vl")
    mean, std = (torch.tensor(values)[:, None, None] for values in (vision.mean, vision.std))
    found = []
    grids = []
    for video in videos:
        pixels = (video.permute(0, 3, 1, 2)[None] / 255 - mean) / std
        patches, *grid = processor.patchify(pixels, vision.patch, vision.merge, 2)
        found.append(patches[0])
        grids.append(grid)
    inputs = {"pixel_values_videos": torch.cat(found), "video_grid_thw": torch.tensor(grids)}
    if has_times(vision):  # with 4 positions a second, as its config has it by default
        inputs["second_per_grid_ts"] = torch.full((len(videos),), interval / 4)
    return inputs


def transformers_scores(model: Any, each: Request, vision: Vision, output: Tokens) -> Tokens:
    """What transformers says of the prompt's tokens from the second on, and of `output`."""
    images = []
    videos: list[list[Tensor]] = []
    end = -1
    for image in each.images:
        pixels = torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8)
        frames = pixels.view(-1, image.height, image.width, 3)
        if len(frames) == 1:
            images.append(frames[0])
        elif image.first in (end, end + 2):  # with the text of a time between
            videos[-1].append(frames)
        else:
            videos.append([frames])
        end = image_end(image)
    inputs = processed(images, vision) if images else {}
    if videos:
        interval = next((image.time for image in each.images if image.time), INTERVAL)
        inputs |= processed_videos([torch.cat(each) for each in videos], vision, interval)
    tokens = each.prompt + [token for token, _ in output]
    ids = torch.tensor([tokens])
    with torch.no_grad():
        kinds = (ids == vision.image_token).int() + 2 * (ids == VIDEO_TOKEN).int()
        logits = model(ids, mm_token_type_ids=kinds, **inputs).logits[0]
    scores = logits.log_softmax(-1)
    return [(token, scores[i, token].item()) for i, token in enumerate(tokens[1:])]
