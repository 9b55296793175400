"""Layers of one model whose attention differs in heads, head size and window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CPU, make_batch, poisoned_cache, run, some_tokens
from torch import Tensor

from gllm_engine.arch import Model, make_arch
from gllm_engine.arch.model import Gqa
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.model import Decoder, fill_randomly
from gllm_engine.ops import reference

# (heads, kv_heads, head_dim, window) of each layer: four kinds of layers, in two cache groups.
SHAPES = [
    (4, 2, 16, None),
    (6, 1, 8, None),
    (4, 2, 16, None),
    (4, 4, 16, 5),
    (4, 2, 16, 5),
    (4, 2, 16, 5),
]


@pytest.fixture
def arch() -> Model:
    model = make_arch(tiny_config("LlamaForCausalLM") | {"num_hidden_layers": len(SHAPES)})

    def mixer(i: int, layer: Any) -> Gqa:
        heads, kv_heads, dim, window = SHAPES[i]
        rope = replace(layer.mixer.rope, dim=dim)
        return replace(
            layer.mixer, heads=heads, kv_heads=kv_heads, head_dim=dim, window=window, rope=rope
        )

    return model.each(mixer=mixer)


@pytest.fixture
def decoder(arch: Model) -> Decoder:
    decoder = Decoder(arch, dtype=torch.float32, device=CPU, max_model_len=64)
    fill_randomly(decoder)
    return decoder


def plain_logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    """The whole sequence at once, in float64, from the weights and the layers' description."""
    weights = {name: view.double() for name, view in decoder.weights().items()}
    eps = decoder.arch.eps
    x = weights["model.embed_tokens.weight"][tokens]
    for i, layer in enumerate(decoder.arch.layers):
        own = {
            n.split(".", 3)[3]: w for n, w in weights.items() if n.startswith(f"model.layers.{i}.")
        }
        normed = F.rms_norm(x, x.shape[-1:], own["input_layernorm.weight"], eps)
        x = x + plain_attention(layer.mixer, own, normed)
        normed = F.rms_norm(x, x.shape[-1:], own["post_attention_layernorm.weight"], eps)
        gate, up, down = (own[f"mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        x = x + (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    x = F.rms_norm(x, x.shape[-1:], weights["model.norm.weight"], eps)
    head = "model.embed_tokens.weight" if decoder.arch.tie else "lm_head.weight"
    return x @ weights[head].T


def plain_attention(mixer: Gqa, own: dict[str, Tensor], x: Tensor) -> Tensor:
    q, k, v = (
        (x @ own[f"self_attn.{part}_proj.weight"].T).view(len(x), -1, mixer.head_dim)
        for part in "qkv"
    )
    position = torch.arange(len(x))
    frequencies = mixer.rope.theta ** -(torch.arange(0, mixer.head_dim, 2) / mixer.head_dim)
    turn = torch.polar(torch.ones(1).double(), position[:, None] * frequencies.double())
    turn = turn[:, None]

    def rotate(heads: Tensor) -> Tensor:
        half = mixer.head_dim // 2
        turned = torch.complex(heads[..., :half], heads[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    group = mixer.heads // mixer.kv_heads
    k, v = rotate(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", rotate(q), k) / mixer.head_dim**0.5
    behind = position[:, None] - position
    seen = (behind >= 0) & (behind < (mixer.window or len(x)))
    chances = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", chances, v).flatten(1) @ own["self_attn.o_proj.weight"].T


def test_each_layer_attends_in_its_own_shape(decoder: Decoder) -> None:
    """A prompt in chunks, then decode rows."""
    tokens, start, pieces = some_tokens(23), 0, []
    cache = poisoned_cache(decoder, 6)
    for size in (9, 1, 10, 1, 1, 1):
        part = tokens[start : start + size]
        rows = [{"tokens": part, "start": start, "pages": [3, 0, 5, 1, 4, 2]}]
        batch = make_batch(rows, num_pages=6)
        pieces.append(run(decoder, batch, cache))
        start += size
    expected = plain_logits(decoder, tokens).float()
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ends_only", [False, True])
def test_a_plan_is_for_layers_of_one_shape(
    decoder: Decoder, ends_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kernels that divide their work ahead rely on; those on a CPU would not mind."""
    planned: dict[int, tuple[int, ...]] = {}
    attended: list[tuple[int, tuple[int, ...]]] = []
    real_plan, real_attend = reference.ReferencePlanner.plan, reference.attend

    def plan(self: Any, batch: Any, cache: Tensor, shape: Any, *rest: int, **more: Any) -> Any:
        made = real_plan(self, batch, cache, shape, *rest, **more)
        planned[id(made)] = (shape.heads, *cache.shape[3:])
        return made

    def attend(inputs: Any, cache: Tensor, plan: Any, *rest: Any, **more: Any) -> Tensor:
        attended.append((id(plan), (inputs.q.shape[1], *cache.shape[3:])))
        return real_attend(inputs, cache, plan, *rest, **more)

    monkeypatch.setattr(reference.ReferencePlanner, "plan", plan)
    monkeypatch.setattr(reference, "attend", attend)
    rows = [{"tokens": some_tokens(9), "start": 0, "pages": [0, 1, 2]}]
    batch = make_batch(rows, num_pages=3)
    if ends_only:
        last = {"logit_rows": torch.tensor([0]), "logit_rows_cpu": torch.tensor([0]).numpy()}
        batch = replace(batch, logit_index=torch.tensor([8]), **last)
    decoder.forward(batch, poisoned_cache(decoder, 3))
    assert [shape for _, shape in attended] == [shape[:3] for shape in SHAPES]
    assert [planned[key] for key, _ in attended] == [shape for _, shape in attended]
    assert len(planned) == 4 + ends_only  # layers that are alike share a plan
    assert attended[0][0] == attended[2][0] != attended[4][0]
    assert (attended[4][0] == attended[5][0]) == (not ends_only)
