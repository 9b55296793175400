"""Random models of transformers that take images, and checkpoints of them as they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from gllm_engine.arch.tiny import tiny_config


def save_reference(
    path: Path, family: str, outer: dict[str, Any] | None = None, **vision: Any
) -> transformers.PreTrainedModel:
    """The model whose checkpoint is in `path` afterwards. `outer`: keys of its config; `vision`: of
    vision_config.
    """
    config = tiny_config(family) | (outer or {})
    config |= {"vision_config": config["vision_config"] | vision}
    torch.manual_seed(0)
    kind = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForImageTextToText.from_config(kind).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(path)
    file = path / "model.safetensors"
    tensors = load_file(file).items()
    if family.startswith("Qwen3VLMoe"):  # transformers reads experts both ways, but writes them so
        save_file({name: transposed(name, tensor) for name, tensor in tensors}, file)
    if family.startswith("Kimi"):  # it gives names of the tower to the text's layers
        save_file({published(name): tensor for name, tensor in tensors}, file)
    return model


def transposed(name: str, tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous() if ".experts." in name else tensor


def published(name: str) -> str:
    for old, new in (
        ("language_model.model.blocks.", "language_model.model.layers."),
        ("model.mm_projector.", "mm_projector."),
        ("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),
        ("pos_emb.position_embeddings", "pos_emb.weight"),
    ):
        name = name.replace(old, new)
    return name


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    """Random ones, uint8 [height, width, 3]."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8) for size in sizes
    ]
