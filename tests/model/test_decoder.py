"""One sequence, computed in any pieces, on any pages, in any company, gives the same logits."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CPU, PAGE, all_logits, load, make_batch, poisoned_cache, run, some_tokens
from torch import Tensor

from gllm_engine.arch import FAMILIES, Shard, make_arch
from gllm_engine.arch.model import AttentionShape
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.model import Decoder, VisionTower
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.ops import reference

ATOL = 2e-5
OVER: dict[str, dict[str, Any]] = {
    name: {
        key: 11 for key in ("sliding_window", "attention_chunk_size") if tiny_config(name).get(key)
    }
    for name in FAMILIES
}


def shuffled_pages(count: int, total: int, seed: int = 5) -> list[int]:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_on_shuffled_pages(tmp_path: Path, family: str) -> None:
    write_tiny_model(tmp_path, family, **OVER[family])
    decoder, tokens = load(tmp_path), some_tokens(41)
    whole = all_logits(decoder, tokens)
    cache, pages = poisoned_cache(decoder, 40), shuffled_pages(11, 40)
    pieces, start = [], 0
    for size in (1, 6, 17, 1, 1, 9, 2, 4):
        part = tokens[start : start + size]
        batch = make_batch([{"tokens": part, "start": start, "pages": pages}], num_pages=40)
        pieces.append(run(decoder, batch, cache))
        start += size
    assert start == len(tokens)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=ATOL)


def test_rows_of_a_batch_do_not_meet(tmp_path: Path) -> None:
    """Three sequences in one batch, decode rows and chunks, as if each were alone."""
    write_tiny_model(tmp_path, "Qwen3ForCausalLM")
    decoder = load(tmp_path)
    cache, order = poisoned_cache(decoder, 40), shuffled_pages(40, 40)
    lens = [(25, 24), (7, 6), (30, 12), (9, 0)]  # all tokens, tokens before the last step
    sequences: list[dict[str, Any]] = []
    for seed, (total, start) in enumerate(lens):
        pages = [order.pop() for _ in range(-(-total // PAGE))]
        sequences.append({"tokens": some_tokens(total, seed=seed), "start": start, "pages": pages})
    for s in sequences:
        if s["start"]:
            first = s | {"tokens": s["tokens"][: s["start"]], "start": 0}
            run(decoder, make_batch([first]), cache)
    rows = [s | {"tokens": s["tokens"][s["start"] :]} for s in sequences]
    together = run(decoder, make_batch(rows), cache)
    expected = [all_logits(decoder, s["tokens"])[s["start"] :] for s in sequences]
    torch.testing.assert_close(together, torch.cat(expected), rtol=0, atol=ATOL)


def test_only_the_wanted_logits(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "LlamaForCausalLM")
    decoder, tokens = load(tmp_path), some_tokens(12)
    batch = make_batch([{"tokens": tokens, "start": 0, "pages": [0, 1, 2]}])
    wanted = type(batch)(**(vars(batch) | {"logit_index": torch.tensor([11, 3])}))
    hidden = decoder.forward(wanted, poisoned_cache(decoder, 3))
    assert hidden.shape == (2, 64)
    logits = decoder.logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, all_logits(decoder, tokens)[[11, 3]], rtol=0, atol=ATOL)


def test_no_logits_wanted(tmp_path: Path) -> None:
    """As in a chunk in the middle of a prompt."""
    decoder = load(write_tiny_model(tmp_path))
    batch = make_batch([{"tokens": some_tokens(4), "start": 0, "pages": [0]}])
    none = type(batch)(**(vars(batch) | {"logit_index": torch.tensor([], dtype=torch.long)}))
    cache = poisoned_cache(decoder, 1)
    assert decoder.logits(decoder.forward(none, cache)).shape == (0, 384)
    assert all(tensor.isfinite().all() for tensor in chain.from_iterable(cache))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_cache_follow_the_spec(family: str) -> None:
    arch = make_arch(tiny_config(family))
    decoder = Decoder(arch, dtype=torch.bfloat16, device=CPU, max_model_len=8)
    shapes, views = arch.weights(), decoder.weights()
    assert views.keys() == shapes.keys()
    for name, view in views.items():
        assert view.shape[-len(shapes[name]) :] == shapes[name], name
    cache = decoder.new_cache(num_pages=3, page_size=4)
    for layer, parts in zip(arch.layers, cache, strict=True):
        pages = layer.mixer.cache_shapes(4)
        assert all(page[1] == 4 for page in pages)
        assert [tuple(part.shape) for part in parts] == [(3, *page) for page in pages]
    size = sum(tensor.nbytes for tensor in chain.from_iterable(cache))
    assert size == 12 * arch.kv_bytes_per_token(itemsize=2)


def test_dynamic_rope_in_pieces(tmp_path: Path) -> None:
    """The published scaling would give early chunks other frequencies than late ones."""
    scaling = {"type": "dynamic", "factor": 4.0}
    write_tiny_model(tmp_path, "LlamaForCausalLM", rope_scaling=scaling, max_position_embeddings=16)
    decoder, tokens = load(tmp_path), some_tokens(40)
    assert decoder.arch.max_len == 64
    cache, pages = poisoned_cache(decoder, 10), list(range(10))
    parts: list[Tensor] = []
    for start in (0, 10, 20, 30):
        row = {"tokens": tokens[start : start + 10], "start": start, "pages": pages}
        parts.append(run(decoder, make_batch([row]), cache))
    torch.testing.assert_close(torch.cat(parts), all_logits(decoder, tokens), rtol=0, atol=ATOL)


def test_a_stage_compiles_kernels_of_others_only_if_their_layers_may_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[list[Any]] = []
    monkeypatch.setattr(reference, "compile_attention", lambda kinds, _: compiled.append(kinds))
    arch = make_arch(tiny_config("GptOssForCausalLM"))  # a window, then none
    stage = Shard(0, 1)
    decoder = Decoder(arch, dtype=torch.float32, device=CPU, max_model_len=64, shard=stage)
    for layers_move in (False, True):
        decoder.compile_kernels(PAGE, torch.float32, layers_move)
    of_stage, of_all = ([kind.shape.window for kind in kinds] for kinds in compiled)
    assert of_stage == [arch.layers[0].mixer.window] and set(of_all) == {None, *of_stage}


def test_the_attention_of_a_tower_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(reference, "compile_attention", lambda kinds, _: compiled.extend(kinds))
    arch = make_arch(tiny_config("Qwen3VLForConditionalGeneration"))
    decoder = Decoder(arch, dtype=torch.float32, device=CPU, max_model_len=64)
    decoder.compile_kernels(PAGE, torch.float32)
    count = len(compiled)
    wide = AttentionShape(2, 2, 64, None)
    monkeypatch.setattr(VisionTower, "compiled_attention", wide)
    decoder.compile_kernels(PAGE, torch.float32)
    assert [kind.shape for kind in compiled[count:]] == [wide, *(k.shape for k in compiled[:count])]
