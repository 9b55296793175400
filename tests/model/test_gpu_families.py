"""Every family on the GPU against the CPU's float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from every_expert import every_expert
from loaded import load_model
from tiny_models import load, make_batch, poisoned_cache, run, some_tokens
from torch import Tensor

from gllm_engine.arch import FAMILIES, read_arch
from gllm_engine.model.tiny import write_tiny_model

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
PAGE = 16


def head_dim(family: str) -> dict[str, int]:
    """Heads of a size that FlashInfer has."""
    if family == "GPTBigCodeForCausalLM":
        return {"n_embd": 256}
    if family == "Phi3ForCausalLM":  # no head_dim, and RoPE factors for a part of the head
        return {"hidden_size": 256, "partial_rotary_factor": 0.125}
    return {"kv_channels": 64} if family.startswith("ChatGLM") else {"head_dim": 64}


@pytest.mark.parametrize("usual", [True, False], ids=["kernels", "odd heads"])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(tmp_path: Path, family: str, dtype: torch.dtype, limit: float, usual: bool) -> None:
    """A prompt in two chunks, beside a decode row: logits by norm."""
    over = every_expert(family) if dtype == torch.bfloat16 else {}
    write_tiny_model(tmp_path, family, **over, **(head_dim(family) if usual else {}))
    arch = read_arch(tmp_path)
    here = load(tmp_path, arch)
    there = load_model(tmp_path, arch, dtype=dtype, device=CUDA, max_model_len=arch.max_len)
    tokens, other = some_tokens(130), some_tokens(70, seed=2)
    first = [
        {"tokens": tokens[:60], "start": 0, "pages": [3, 5, 7, 9]},
        {"tokens": other[:69], "start": 0, "pages": [2, 4, 6, 8, 10]},
    ]
    second = [
        {"tokens": other[69:], "start": 69, "pages": [2, 4, 6, 8, 10]},
        {"tokens": tokens[60:], "start": 60, "pages": [3, 5, 7, 9, 11, 12, 13, 14, 15]},
    ]
    caches = poisoned_cache(here, 16, PAGE), poisoned_cache(there, 16, PAGE)
    for rows in (first, second):
        batch = make_batch(rows, PAGE, num_pages=16)
        expected = run(here, batch, caches[0]).double()
        moved = {k: v.to(CUDA) for k, v in vars(batch).items() if isinstance(v, Tensor)}
        found = run(there, replace(batch, **moved), caches[1]).double().cpu()
        assert found.isfinite().all()
        assert (found - expected).norm() <= limit * expected.norm()
        # And no position is worse than the rest; in bfloat16 on a CPU the worst is off by 0.025.
        assert ((found - expected).norm(dim=1) <= 2 * limit * expected.norm(dim=1)).all()
