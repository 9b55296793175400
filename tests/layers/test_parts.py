"""The parts of a decoder, each by itself."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gllm_engine.arch.model import Dense
from gllm_engine.arch.rope import DynamicScaling, Rope
from gllm_engine.layers import DenseFfn, Platform, RopeTable
from gllm_engine.layers.linear import Linear
from gllm_engine.ops import reference
from gllm_engine.parallel import ALONE

CPU = torch.device("cpu")
PLATFORM = Platform(reference, torch.float32, CPU, ALONE)


def test_linear_is_its_projections_side_by_side() -> None:
    shapes = {"a.weight": (3, 4), "a.bias": (3,), "b.weight": (2, 4), "b.bias": (2,)}
    linear = Linear(["a", "b"], shapes, PLATFORM)
    views = linear.weights()
    assert {name: tuple(view.shape) for name, view in views.items()} == shapes
    for view in views.values():
        view.normal_()
    x = torch.randn(5, 4)
    a = x @ views["a.weight"].T + views["a.bias"]
    b = x @ views["b.weight"].T + views["b.bias"]
    torch.testing.assert_close(linear(x), torch.cat((a, b), 1))
    total = torch.randn(5, 5)
    expected = total + torch.cat((a, b), 1)
    assert linear.add_to(total, x) is total
    torch.testing.assert_close(total, expected)


def test_linear_without_bias() -> None:
    linear = Linear(["a"], {"a.weight": (3, 4)}, PLATFORM)
    (weight,) = linear.weights().values()
    weight.fill_(2.0)
    assert linear(torch.ones(1, 4)).tolist() == [[8.0, 8.0, 8.0]]


@pytest.mark.parametrize("dense", [Dense(8), Dense(8, act="gelu"), Dense(8, gated=False)])
def test_an_activation_is_told_the_weight_that_takes_it(
    dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its kernel may round what that product would round."""
    taken = []
    for name in ("gated_linear", "activate"):
        real = getattr(reference, name)

        def keep(*args: Any, real: Any = real, **options: Any) -> Any:
            taken.append(args[-1])
            return real(*args, **options)

        monkeypatch.setattr(reference, name, keep)
    ffn = DenseFfn(dense, 4, PLATFORM)
    assert ffn(torch.ones(2, 4), None).shape == (2, 4)
    assert taken[0].data_ptr() == ffn.weights()["mlp.down_proj.weight"].data_ptr()


def test_rope_table_holds_the_angles() -> None:
    table = RopeTable(Rope(6, 100.0), 50, CPU)
    assert table.cos.shape == table.sin.shape == (50, 3)
    for position in (0, 7, 49):
        for pair in range(3):
            angle = position * 100.0 ** (-2 * pair / 6)
            assert math.isclose(table.cos[position, pair], math.cos(angle), abs_tol=1e-5)
            assert math.isclose(table.sin[position, pair], math.sin(angle), abs_tol=1e-5)


def test_dynamic_rope_depends_on_the_configured_length_alone() -> None:
    plain, scaled = Rope(8, 100.0), Rope(8, 100.0, scaling=DynamicScaling(2.0, 32))
    short, trained = (RopeTable(scaled, n, CPU).cos[:16] for n in (16, 32))
    torch.testing.assert_close(short, trained)
    torch.testing.assert_close(short, RopeTable(plain, 16, CPU).cos)
    stretched = RopeTable(scaled, 64, CPU).cos[:16]
    assert (stretched - short).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("family", "name", "rope"),
    [
        ("qwen2_5_vl", "Qwen2_5_VLRotaryEmbedding", Rope(16, 1e4, sections=(2, 3, 3))),
        ("qwen3_vl", "Qwen3VLTextRotaryEmbedding", Rope(20, 1e4, sections=(5, 3, 2))),
        ("qwen3_5", "Qwen3_5TextRotaryEmbedding", Rope(16, 1e4, sections=(3, 3, 2))),
    ],
)
def test_sections_turn_with_positions_of_their_own(family: str, name: str, rope: Rope) -> None:
    rope = replace(rope, sections_interleaved=family != "qwen2_5_vl")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(rope.sections)}
    config = SimpleNamespace(
        head_dim=rope.dim, rope_parameters=parameters, max_position_embeddings=64
    )
    positions = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(1))
    expected = getattr(module, name)(config)(torch.zeros(1), positions[:, None])
    cos, sin, rows = RopeTable(rope, 64, CPU).rows(positions)
    for ours, theirs in zip((cos, sin), expected, strict=True):
        torch.testing.assert_close(ours[rows], theirs[0, :, : rope.dim // 2])
