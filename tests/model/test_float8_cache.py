"""Every family over a float8 KV cache: logits come near the exact ones, and are not they."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from every_expert import every_expert
from loaded import load_model
from tiny_models import PAGE, all_logits, load, make_batch, poisoned_cache, run, some_tokens
from torch import Tensor

from gllm_engine.arch import FAMILIES, read_arch
from gllm_engine.model import Decoder
from gllm_engine.model.tiny import write_tiny_model

# Of logits, by norm. A number of 3 mantissa bits is off by up to 1/16, by 1/40 in the mean.
LEAST, MOST = 0.005, 0.08


def float8_logits(decoder: Decoder, tokens: Tensor, sizes: list[int]) -> Tensor:
    """Logits of every position of one sequence, computed in pieces of these sizes."""
    num_pages = -(-len(tokens) // PAGE)
    cache = poisoned_cache(decoder, num_pages, PAGE, torch.float8_e4m3fn)
    logits, start = [], 0
    for part in tokens.split(sizes):
        row = {"tokens": part, "start": start, "pages": list(range(num_pages))}
        logits.append(run(decoder, make_batch([row], num_pages=num_pages), cache))
        start += len(part)
    return torch.cat(logits)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_near(tmp_path: Path, family: str) -> None:
    over = {"sliding_window": 11} if family.startswith("Mistral") else {}
    over |= every_expert(family)
    decoder, tokens = load(write_tiny_model(tmp_path, family, **over)), some_tokens(41)
    whole = float8_logits(decoder, tokens, [41])
    assert LEAST < distance(whole, all_logits(decoder, tokens)) < MOST
    # Tokens attend to what was rounded wherever they stand, so pieces give the same.
    pieces = float8_logits(decoder, tokens, [1, 6, 17, 1, 1, 9, 2, 4])
    assert distance(pieces, whole) < LEAST / 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(tmp_path: Path, dtype: torch.dtype) -> None:
    write_tiny_model(tmp_path, "Qwen3ForCausalLM")
    arch, cpu, tokens = read_arch(tmp_path), torch.device("cpu"), some_tokens(41)
    half = load_model(tmp_path, arch, dtype=dtype, device=cpu, max_model_len=64)
    found = float8_logits(half, tokens, [30, 1, 1, 9])
    assert LEAST < distance(found, all_logits(load(tmp_path), tokens)) < MOST
