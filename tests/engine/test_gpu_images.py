"""Images on a GPU: the tower's embeddings and the tokens that follow are the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_expert import every_expert, usual_heads
from PIL import Image
from torch import Tensor

from gllm_engine import LLM, RequestOutput, SamplingParams, write_tiny_model
from gllm_engine.arch import read_arch
from gllm_engine.arch.vision import Vision
from gllm_engine.model import VisionTower

pytestmark = pytest.mark.gpu
FAMILIES = (
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "KimiK25ForConditionalGeneration",
)
SIZES = ((64, 96), (120, 40), (200, 130), (33, 57))
CONFIG = {"max_model_len": 512, "num_pages": 300, "max_num_seqs": 4}
ASKED = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=0)


def tiny(path: Path, family: str) -> Path:
    return write_tiny_model(path, family, **usual_heads(family), **every_expert(family))


def picture(height: int, width: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def answers(model: Path, **config: Any) -> list[RequestOutput]:
    prompts = [
        {"prompt": f"Number {i}: ", "images": [Image.fromarray(picture(*size))] * (1 + i % 2)}
        for i, size in enumerate(SIZES)
    ]
    with LLM(str(model), **CONFIG | config) as llm:
        outputs = llm.generate([*prompts, "No image."], ASKED)
        llm.engine.check_integrity()
    assert not any(output.error for output in outputs)
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_cpus(family: str, tmp_path: Path) -> None:
    """In float32 all of them, whole and in chunks that end inside images."""
    model = tiny(tmp_path, family)
    expected = tokens(answers(model, device="cpu", dtype="float32"))
    for more in ({}, {"max_num_batched_tokens": 24}):
        assert tokens(answers(model, dtype="float32", **more)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_in_bfloat16(family: str, tmp_path: Path) -> None:
    """They are close as long as the tokens are the same, in graphs too."""
    model = tiny(tmp_path, family)
    expected = answers(model, device="cpu", dtype="float32")
    found = answers(model, dtype="bfloat16")
    offs = []
    for one, other in zip(found, expected, strict=True):
        ids = one.outputs[0].token_ids
        wanted = other.outputs[0].token_ids
        for i, (entry, own) in enumerate(
            zip(one.outputs[0].logprobs or [], other.outputs[0].logprobs or [], strict=True)
        ):
            if ids[: i + 1] == wanted[: i + 1]:
                offs.append(abs(entry[ids[i]]["logprob"] - own[ids[i]]["logprob"]))
    print(f"{len(offs)} log probabilities differ by {max(offs):.3f} at most")
    assert len(offs) >= 10 and max(offs) < 0.25 and sum(offs) / len(offs) < 0.05


def pictures_for(vision: Vision) -> list[Tensor]:
    """The last one is long enough for another kernel of attention."""
    side = vision.patch * vision.merge
    sizes = [(side * 2, side * 3), (side * 5, side * 4), (side, side), (side * 24, side * 25)]
    if vision.has_class:
        sizes = [(vision.patch * vision.table,) * 2] * 3
    return [torch.from_numpy(picture(*size)) for size in sizes]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_host_does_not_wait_for_the_tower(family: str, tmp_path: Path) -> None:
    vision = read_arch(tiny(tmp_path, family)).vision
    assert vision is not None
    tower = VisionTower(vision, torch.bfloat16, torch.device("cuda"))
    for weight in tower.weights().values():
        weight.normal_(0, 0.1)
    images = [image.cuda() for image in pictures_for(vision)]
    expected = tower.encode(images)  # which compiles kernels
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = tower.encode(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_embeddings_in_bfloat16(family: str, tmp_path: Path) -> None:
    """Several images in one call are each alone, and close to the CPU's in float32."""
    vision = read_arch(tiny(tmp_path, family)).vision
    assert vision is not None
    expected = VisionTower(vision, torch.float32, torch.device("cpu"))
    found = VisionTower(vision, torch.bfloat16, torch.device("cuda"))
    generator = torch.Generator().manual_seed(1)
    for name, weight in expected.weights().items():
        weight.normal_(0, 0.1, generator=generator)
        found.weights()[name].copy_(weight)
    images = pictures_for(vision)
    together = found.encode([image.cuda() for image in images])
    for image, own in zip(images, together, strict=True):
        alone = found.encode([image.cuda()])[0]
        torch.testing.assert_close(own, alone, atol=0.05, rtol=0.05)
        (wanted,) = expected.encode([image])
        off = (own.float().cpu() - wanted).norm() / wanted.norm()
        assert off < 0.03, off
