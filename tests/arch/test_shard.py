"""Shares of a model: together they are the whole, by their shapes and by what the loader reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stored_weights import weights_in
from torch import Tensor

from gllm_engine.arch import FAMILIES, ArchError, Gqa, Model, Shard, make_arch, read_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.model import Decoder, filling, open_checkpoint
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.parallel import TensorParallel

CPU = torch.device("cpu")
BIASED: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("ChatGLMModel", {"add_bias_linear": True}),
]


def text_keys(family: str) -> set[str]:
    config = tiny_config(family)
    return config.get("text_config", config).keys()


HAS_EXPERTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
CASES = [
    *((family, {}, False) for family in FAMILIES),
    *((family, {}, True) for family in FAMILIES if HAS_EXPERTS & text_keys(family)),
    *((family, over, False) for family, over in BIASED),
    ("LlamaForCausalLM", {"intermediate_size": 198, "mlp_bias": True}, False),
    ("GptOssForCausalLM", {"intermediate_size": 45}, False),
    ("LlamaForCausalLM", {"vocab_size": 389}, False),
    ("GraniteForCausalLM", {"vocab_size": 389, "tie_word_embeddings": True}, False),
]
# Every rank has these whole: what they work on is the same on all.
EVERYWHERE = (
    "norm.weight",
    "norm.bias",
    "embed_positions.weight",
    "mlp.gate.weight",
    "mlp.gate.bias",
    "e_score_correction_bias",
    "shared_expert_gate.weight",
    "q_a_proj.weight",
    "kv_a_proj_with_mqa.weight",
    "indexer.wq_b.weight",
    "indexer.wk.weight",
    "indexer.weights_proj.weight",
)
# But the gain of a norm of all heads together is shared out with the heads.
WHOLE_QK_NORM = ("Olmo2ForCausalLM", "Olmo3ForCausalLM", "MiniMaxM2ForCausalLM")
SIZES = [1, 2, 4]  # of the 2 key/value heads, 4 ranks share two each


def shards(model: Model, size: int, apart: bool) -> Iterator[list[Shard]]:
    """Of two stages, uneven where there are layers enough: those of the ranks of each."""
    cut = len(model.layers) - 1
    for first, end in ((0, cut), (cut, len(model.layers))):
        yield [Shard(first, end, rank, size, apart) for rank in range(size)]


def whole_of(shape: tuple[int, ...], parts: list[Tensor], starts: list[list[int]]) -> Tensor:
    """Put parts where they begin in the whole. What no part covers stays NaN; where several do,
    they must agree.
    """
    whole = torch.full(shape, float("nan"))
    for part, start in zip(parts, starts, strict=True):
        place = whole[tuple(slice(at, at + n) for at, n in zip(start, part.shape, strict=True))]
        assert torch.equal(place[~place.isnan()], part[~place.isnan()])
        place.copy_(part)
    return whole


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("family", "over", "apart"), CASES)
def test_shapes_add_up(family: str, over: dict[str, Any], apart: bool, size: int) -> None:
    model = make_arch(tiny_config(family, **over))
    seen = set()
    for stage in shards(model, size, apart):
        held = [shard.weights(model) for shard in stage]
        for name in {name for each in held for name in each}:
            seen.add(name)
            whole, parts = model.weights()[name], [each[name] for each in held if name in each]
            of_all_heads = family in WHOLE_QK_NORM and ".self_attn." in name
            of_tower = name.startswith("visual.")
            everywhere = name.endswith(EVERYWHERE) or of_tower
            copies = size if everywhere and not of_all_heads else 1
            mixers = [layer.mixer for layer in model.layers]
            kv_heads = next((mixer.kv_heads for mixer in mixers if isinstance(mixer, Gqa)), 1)
            of_keys = any(part in name for part in (".k_proj.", ".v_proj."))
            of_keys |= of_all_heads and ".k_norm." in name
            if of_keys and not of_tower:
                copies = max(1, size // kv_heads)
            has_even = over.get("intermediate_size", 0) % size == 0
            of_vocab = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            is_uneven = (".mlp." in name and not has_even) or (of_vocab and "vocab_size" in over)
            assert len(set(parts)) == 1 or is_uneven
            assert sum(map(prod, parts)) == copies * prod(whole), name
    assert seen == model.weights().keys()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("family", "over", "apart"), CASES)
def test_what_all_ranks_load_is_the_checkpoint(
    tmp_path: Path, family: str, over: dict[str, Any], apart: bool, size: int
) -> None:
    write_tiny_model(tmp_path, family, **over)
    model, stored = read_arch(tmp_path), load_file(tmp_path / "model.safetensors")
    found: dict[str, Tensor] = {}
    for stage in shards(model, size, apart):
        loaded = []
        for shard in stage:
            ranks = TensorParallel(shard.rank, size, CPU, None, True)
            options = {"dtype": torch.float32, "device": CPU, "max_model_len": 64}
            decoder = Decoder(model, shard=shard, ranks=ranks, **options)
            with open_checkpoint(model, tmp_path) as checkpoint, filling(decoder, checkpoint):
                pass
            views = decoder.weights()
            shapes = {name: shape_of(view, name, model) for name, view in views.items()}
            assert shapes == shard.weights(model)
            loaded.append((shard, views))
        for name in {name for _, weights in loaded for name in weights}:
            whole = model.weights()[name]
            parts, starts = [], []
            for shard, weights in loaded:
                if name in weights:
                    for copy in weights[name].reshape(-1, *shape_of(weights[name], name, model)):
                        parts.append(copy)
                        starts.append(list(map(shard.start, whole, copy.shape)))
            found[name] = whole_of(whole, parts, starts)
    for name, tensor in stored.items():
        for part, weight in weights_in(model, name, tensor).items():
            assert torch.equal(found[part], weight), part


def shape_of(view: Tensor, name: str, model: Model) -> tuple[int, ...]:
    """Of one copy: a view may have a leading dimension more than the weight."""
    return tuple(view.shape[-len(model.weights()[name]) :])


def test_parts_follow_each_other() -> None:
    """Of any number of units, whether ranks have equal parts or some have one unit more."""
    for size in range(1, 13):
        for units in range(size, 5 * size):
            least, more = divmod(units, size)
            at = 0
            for rank in range(size):
                part = least + (rank < more)
                for unit in (1, 32):
                    shard = Shard(0, 1, rank, size)
                    assert shard.start(units * unit, part * unit) == at * unit
                at += part
            assert at == units


def test_shares_of_the_vocabulary_follow_each_other() -> None:
    for size in range(1, 9):
        for vocab in (*range(56, 200), 32001, 49155, 50257, 128258, 151936):
            shards = [Shard(0, 1, rank, size) for rank in range(size)]
            rows = [shard.vocab_rows(vocab) for shard in shards]
            width = shards[0].vocab_width(vocab)
            assert sum(rows) == vocab and min(rows) > 0
            assert rows[:-1] == [width] * (size - 1) and rows[-1] <= width
            assert size == 1 or width % 8 == 0 or vocab < 8 * size * size
            starts = [shard.start(vocab, own) for shard, own in zip(shards, rows, strict=True)]
            assert starts == [rank * width for rank in range(size)]


@pytest.mark.parametrize(
    ("size", "over", "sentence"),
    [
        (3, {}, "3 does not divide the model's num_attention_heads=4"),
        (4, {"vocab_size": 9}, "4 ranks cannot each have some of the model's vocab_size=9"),
        (
            4,
            {"intermediate_size": 3},
            "4 ranks cannot each have some of the model's intermediate_size=3",
        ),
        (
            4,
            {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 16},
            "4 ranks can neither share out the model's 6 key/value heads evenly nor be shared out",
        ),
    ],
)
def test_what_does_not_divide_is_refused(size: int, over: dict[str, Any], sentence: str) -> None:
    model = make_arch(tiny_config("LlamaForCausalLM", **over))
    with pytest.raises(ArchError, match=f"tensor_parallel_size: {sentence}"):
        Shard(0, 2, 0, size).of(model)


def test_a_shared_expert_that_is_too_small_is_refused() -> None:
    model = make_arch(tiny_config("Qwen2MoeForCausalLM", shared_expert_intermediate_size=3))
    with pytest.raises(
        ArchError, match="4 ranks cannot each have some of the model's width of the shared expert=3"
    ):
        Shard(0, 2, 0, 4).of(model)


def test_one_rank_adds_the_biases_of_experts() -> None:
    """Of slices of experts the first rank; of whole experts the rank that has them."""
    model = make_arch(tiny_config("MixtralForCausalLM"))
    model = model.each(ffn=lambda _, layer: replace(layer.ffn, bias=True, out_bias=True))
    for apart, expected in ((False, [True, False]), (True, [True, True])):
        ffns = [Shard(0, 2, rank, 2, apart).of(model)[0].ffn for rank in range(2)]
        assert [ffn.out_bias for ffn in ffns] == expected
        assert all(ffn.bias for ffn in ffns)
