"""Loading tiny models in ours and in transformers, and running one sequence through ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from loaded import load_model
from torch import Tensor

from gllm_engine.arch import Model, read_arch
from gllm_engine.model import Decoder, LayerCache
from gllm_engine.ops import Batch, RecurrentState

CPU = torch.device("cpu")
PAGE = 4
# Cache groups in a batch: at least as many as any model here has.
GROUPS = 6
# Rows of a batch: at most as many as any test has.
ROWS = 16


def load(path: Path, arch: Model | None = None, max_model_len: int | None = None) -> Decoder:
    arch = arch or read_arch(path)
    length = max_model_len or arch.max_len
    return load_model(path, arch, dtype=torch.float32, device=CPU, max_model_len=length)


def poisoned_cache(
    decoder: Decoder, num_pages: int, page_size: int = PAGE, dtype: torch.dtype | None = None
) -> list[LayerCache]:
    """`num_pages` for each group. Every number is NaN until the decoder writes it.

    The states of layers that keep one per sequence are zero, as at the start of a sequence.
    """
    states = decoder.new_states(ROWS)
    cache = decoder.new_cache(num_pages * len(decoder.groups), page_size, dtype, states)
    for parts in cache:
        if not isinstance(parts, RecurrentState):
            for pages in parts:
                assert pages.dtype == (dtype or decoder.dtype)
                pages.fill_(float("nan"))
    return cache


def make_batch(rows: list[dict[str, Any]], page_size: int = PAGE, num_pages: int = 0) -> Batch:
    """A batch that wants all logits. A row: tokens, start, pages; one-token rows first.

    Group g has page p + g * num_pages where a row has page p.
    """
    lens = [len(row["tokens"]) for row in rows]
    positions = [torch.arange(r["start"], r["start"] + n) for r, n in zip(rows, lens, strict=True)]
    width = max(len(row["pages"]) for row in rows)
    pages = torch.tensor([r["pages"] + [0] * (width - len(r["pages"])) for r in rows])
    table = pages + num_pages * torch.arange(GROUPS)[:, None, None]
    index = [
        table[:, i, p // page_size] * page_size + p % page_size for i, p in enumerate(positions)
    ]
    num_decode = next((i for i, n in enumerate(lens) if n > 1), len(lens))
    return Batch(
        tokens=torch.cat([torch.as_tensor(row["tokens"]) for row in rows]),
        positions=torch.cat(positions),
        cache_index=torch.cat(index, 1),
        page_table=table,
        slots=torch.arange(len(rows)),
        context_lens=torch.tensor([row["start"] + n for row, n in zip(rows, lens, strict=True)]),
        context_lens_cpu=np.array([row["start"] + n for row, n in zip(rows, lens, strict=True)]),
        query_lens=lens,
        num_decode=num_decode,
        logit_index=torch.arange(sum(lens)),
    )


def run(decoder: Decoder, batch: Batch, cache: list[LayerCache]) -> Tensor:
    return decoder.logits(decoder.forward(batch, cache))


def all_logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits of every position of one sequence, computed whole."""
    num_pages = -(-len(tokens) // PAGE)
    rows = [{"tokens": tokens, "start": 0, "pages": list(range(num_pages))}]
    batch = make_batch(rows, num_pages=num_pages)
    return run(decoder, batch, poisoned_cache(decoder, num_pages))


def reference_logits(path: Path, tokens: Tensor) -> Tensor:
    """The same from transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens[None], use_cache=False).logits[0]


def some_tokens(count: int, vocab: int = 384, seed: int = 1) -> Tensor:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))
