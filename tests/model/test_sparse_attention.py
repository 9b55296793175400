"""DeepSeek Sparse Attention beside dense latent attention, and over every kind of cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import CPU, PAGE, all_logits, load, make_batch, poisoned_cache, run, some_tokens
from torch import Tensor

from gllm_engine.arch import make_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.model import Decoder
from gllm_engine.model.tiny import write_tiny_model

TOP_K = 12
V32 = "DeepseekV32ForCausalLM"


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load(write_tiny_model(tmp_path_factory.mktemp("v32"), V32, index_topk=TOP_K))


@pytest.fixture(scope="module")
def dense(sparse: Decoder) -> Decoder:
    """The same weights, without the indexer."""
    arch = make_arch(tiny_config("DeepseekV3ForCausalLM"))
    decoder = Decoder(arch, dtype=torch.float32, device=CPU, max_model_len=arch.max_len)
    source = sparse.weights()
    for name, view in decoder.weights().items():
        view.copy_(source[name])
    return decoder


def in_pieces(
    decoder: Decoder, tokens: Tensor, sizes: list[int], dtype: torch.dtype | None = None
) -> Tensor:
    """Logits of every position of one sequence, computed in pieces of these sizes."""
    num_pages = -(-len(tokens) // PAGE)
    cache = poisoned_cache(decoder, num_pages, PAGE, dtype)
    logits = []
    start = 0
    for part in tokens.split(sizes):
        row = {"tokens": part, "start": start, "pages": list(range(num_pages))[::-1]}
        logits.append(run(decoder, make_batch([row], num_pages=num_pages), cache))
        start += len(part)
    return torch.cat(logits)


def test_up_to_top_k_tokens_it_is_dense(sparse: Decoder, dense: Decoder) -> None:
    """Bit for bit; from the first token beyond on, it is not."""
    tokens = some_tokens(TOP_K + 1)
    assert torch.equal(all_logits(sparse, tokens[:-1]), all_logits(dense, tokens[:-1]))
    ours, theirs = all_logits(sparse, tokens), all_logits(dense, tokens)
    torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=0, atol=2e-5)
    assert (ours[-1] - theirs[-1]).abs().max() > 1e-3


def test_short_and_long_rows_in_a_step(sparse: Decoder) -> None:
    """Rows that attend to everything, beside rows that do not, as if each were alone."""
    lens = [(40, 39), (5, 4), (TOP_K, TOP_K - 1), (30, 8), (7, 0), (TOP_K + 1, 2)]
    rows = []
    first = 0
    for seed, (total, start) in enumerate(lens):
        pages = list(range(first, first + -(-total // PAGE)))
        first += len(pages)
        rows.append({"tokens": some_tokens(total, seed=seed), "start": start, "pages": pages})
    cache = poisoned_cache(sparse, first)
    for row in rows:
        if row["start"]:
            before = row | {"tokens": row["tokens"][: row["start"]], "start": 0}
            run(sparse, make_batch([before], num_pages=first), cache)
    step = [row | {"tokens": row["tokens"][row["start"] :]} for row in rows]
    together = run(sparse, make_batch(step, num_pages=first), cache)
    expected = [all_logits(sparse, row["tokens"])[row["start"] :] for row in rows]
    torch.testing.assert_close(together, torch.cat(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn])
def test_pieces_are_the_whole(sparse: Decoder, dtype: torch.dtype | None) -> None:
    """Over float8 too: every token attends to what is stored, and chooses by it."""
    tokens = some_tokens(41)
    whole = in_pieces(sparse, tokens, [41], dtype)
    pieces = in_pieces(sparse, tokens, [1, 6, 17, 1, 1, 9, 2, 4], dtype)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=2e-5)
    assert torch.equal(whole, all_logits(sparse, tokens)) == (dtype is None)


def test_only_layers_with_an_indexer_have_index_keys(tmp_path: Path) -> None:
    """The weights of the others are left out too, also where a checkpoint has them."""
    sizes = {"num_hidden_layers": 3}
    write_tiny_model(tmp_path, "GlmMoeDsaForCausalLM", **sizes)
    over = sizes | {"indexer_types": ["full", "full", "shared"]}
    config = tiny_config("GlmMoeDsaForCausalLM", **over)
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder = load(tmp_path)
    assert not any("layers.2.self_attn.indexer" in name for name in decoder.weights())
    assert [len(layer) for layer in decoder.new_cache(3, PAGE)] == [2, 2, 1]
    width = 3 * (32 + 16) + 2 * 24
    assert decoder.page_bytes(PAGE, torch.float32) == 4 * PAGE * width
    tokens = some_tokens(41)
    whole = in_pieces(decoder, tokens, [41])
    pieces = in_pieces(decoder, tokens, [1, 6, 17, 1, 1, 9, 2, 4])
    torch.testing.assert_close(pieces, whole, rtol=0, atol=2e-5)


def test_a_page_has_index_keys(sparse: Decoder, dense: Decoder) -> None:
    """In the pages of the latents: one group, one page table."""
    assert len(sparse.groups) == len(dense.groups) == 1
    width = 2 * (32 + 16)  # of both layers
    assert dense.page_bytes(PAGE, torch.float32) == 4 * PAGE * width
    assert sparse.page_bytes(PAGE, torch.float32) == 4 * PAGE * (width + 2 * 24)
    cache = sparse.new_cache(3, PAGE)
    assert sum(part.nbytes for layer in cache for part in layer) == 3 * sparse.page_bytes(
        PAGE, torch.float32
    )
    assert len({part.data_ptr() for layer in cache for part in layer}) == 4
