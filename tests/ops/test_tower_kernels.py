"""A vision tower of a GPU's operations against one of the CPU's, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import INTERPRETED
from test_ops_protocol import without_flashinfer

from gllm_engine.arch import make_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.model import VisionTower, vision_tower


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton and its interpreter")
@pytest.mark.parametrize(
    ("family", "head_dim"),
    [
        ("Qwen2_5_VLForConditionalGeneration", 80),
        ("Qwen3VLForConditionalGeneration", 72),
        ("LlavaForConditionalGeneration", 64),
        ("Mistral3ForConditionalGeneration", 64),
        ("Kimi_K25ForConditionalGeneration", 72),
    ],
)
def test_kernels_of_a_tower(monkeypatch: pytest.MonkeyPatch, family: str, head_dim: int) -> None:
    vision = make_arch(tiny_config(family)).vision
    assert vision is not None
    vision = replace(vision, dim=2 * head_dim, heads=2, depth=1, deep=(0,) * bool(vision.deep))
    slow = VisionTower(vision, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(vision_tower, "select_ops", lambda _: without_flashinfer(monkeypatch))
    fast = VisionTower(vision, torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    for name, weight in slow.weights().items():
        weight.normal_(0, 0.1)
        fast.weights()[name].copy_(weight)
    side = vision.patch * (vision.table if vision.has_class else 2 * vision.merge)
    images = list(torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8))
    for found, expected in zip(fast.encode(images), slow.encode(images), strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm() and expected.std() > 0.01
