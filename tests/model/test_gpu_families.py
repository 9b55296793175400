"""Every family on the GPU against the CPU's float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from every_expert import every_expert, usual_heads
from loaded import load_model
from tiny_models import load, make_batch, poisoned_cache, run, some_tokens
from torch import Tensor

from gllm_engine.arch import FAMILIES, read_arch
from gllm_engine.model.tiny import write_tiny_model

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PAGE = 16


@pytest.mark.parametrize("usual", [True, False], ids=["kernels", "odd heads"])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(tmp_path: Path, family: str, dtype: torch.dtype, limit: float, usual: bool) -> None:
    """A prompt in two chunks, beside a decode row: logits by norm.

    No position is much worse than the rest, unless the CPU's rounding makes it so: a gated norm of
    a state near zero enlarges any rounding.
    """
    over = every_expert(family) if dtype == torch.bfloat16 else {}
    write_tiny_model(tmp_path, family, **over, **(usual_heads(family) if usual else {}))
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
    models = [here, there]
    if dtype != torch.float32:
        models.append(
            load_model(tmp_path, arch, dtype=dtype, device=CPU, max_model_len=arch.max_len)
        )
    caches = [poisoned_cache(model, 16, PAGE) for model in models]
    for rows in (first, second):
        batch = make_batch(rows, PAGE, num_pages=16)
        expected = run(here, batch, caches[0]).double()
        off = torch.zeros(len(expected))  # by the CPU's rounding
        for model, cache in zip(models[2:], caches[2:], strict=True):
            off = (run(model, batch, cache).double() - expected).norm(dim=1)
        moved = {k: v.to(CUDA) for k, v in vars(batch).items() if isinstance(v, Tensor)}
        found = run(there, replace(batch, **moved), caches[1]).double().cpu()
        assert found.isfinite().all()
        assert (found - expected).norm() <= limit * expected.norm()
        allowed = 2 * limit * expected.norm(dim=1) + off
        assert ((found - expected).norm(dim=1) <= allowed).all()
