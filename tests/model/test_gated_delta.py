"""The gated delta rule's layer against transformers', whole, in chunks, and as decode rows."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_batch
from torch import Tensor
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from gllm_engine.arch.model import GatedDelta, Model
from gllm_engine.layers import ForwardContext, GatedDeltaAttention, Platform
from gllm_engine.ops import RecurrentState, reference
from gllm_engine.parallel import ALONE

DIM, EPS = 48, 1e-5
CPU = torch.device("cpu")
SHAPES = [GatedDelta(2, 4, 16, 24, 4), GatedDelta(3, 3, 8, 8, 4), GatedDelta(1, 4, 8, 16, 3)]


def make_twins(arch: GatedDelta) -> tuple[GatedDeltaAttention, Qwen3NextGatedDeltaNet]:
    """The same random weights; transformers' rows are interleaved by key head."""
    torch.manual_seed(3)
    model = Model(dim=DIM, vocab=1, layers=(), eps=EPS, tie=True, max_len=1)
    layer = GatedDeltaAttention(arch, 0, model, Platform(reference, torch.float32, CPU, ALONE))
    config = Qwen3NextConfig(
        hidden_size=DIM,
        linear_num_key_heads=arch.k_heads,
        linear_num_value_heads=arch.v_heads,
        linear_key_head_dim=arch.k_dim,
        linear_value_head_dim=arch.v_dim,
        linear_conv_kernel_dim=arch.conv,
        rms_norm_eps=EPS,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    twin = Qwen3NextGatedDeltaNet(config, 0).eval()
    own = {k.removeprefix("linear_attn."): v for k, v in layer.weights().items()}
    for name, view in own.items():
        view.normal_(0.0, 0.5 if "conv" in name else 0.3)
    own["norm.weight"].uniform_(0.5, 1.5)
    heads = arch.k_heads

    def interleaved(*names: str) -> Tensor:
        parts = [own[f"in_proj_{name}.weight"].unflatten(0, (heads, -1)) for name in names]
        return torch.cat(parts, 1).flatten(0, 1)

    twin.load_state_dict(
        {
            "in_proj_qkvz.weight": interleaved("q", "k", "v", "z"),
            "in_proj_ba.weight": interleaved("b", "a"),
            "conv1d.weight": torch.cat([own[f"conv_{part}.weight"] for part in "qkv"]),
            "A_log": own["A_log"],
            "dt_bias": own["dt_bias"],
            "norm.weight": own["norm.weight"],
            "out_proj.weight": own["out_proj.weight"],
        }
    )
    return layer, twin


def new_state(arch: GatedDelta, rows: int) -> RecurrentState:
    conv = torch.zeros(rows, arch.conv_width, arch.conv - 1)
    return RecurrentState(conv, torch.zeros(rows, arch.v_heads, arch.k_dim, arch.v_dim))


def run(layer: GatedDeltaAttention, rows: list[Tensor], state: RecurrentState) -> Tensor:
    """One step; row i is in slot i. Rows of one token come first."""
    batch = make_batch([{"tokens": [0] * len(x), "start": 0, "pages": [0] * 99} for x in rows])
    plan = layer.plan(reference.make_planner(CPU, torch.float32), batch, state)
    return layer(torch.cat(rows), None, ForwardContext({layer.plan_key: plan}, {}, {}), state)


@torch.inference_mode()
@pytest.mark.parametrize("arch", SHAPES)
def test_it_is_transformers_layer(arch: GatedDelta) -> None:
    layer, twin = make_twins(arch)
    xs = [torch.randn(n, DIM) for n in (70, 33, 2)]
    found = run(layer, xs, new_state(arch, 3))
    expected = torch.cat([twin(x[None])[0] for x in xs])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("arch", SHAPES)
def test_pieces_make_the_whole(arch: GatedDelta) -> None:
    """Chunks of one sequence beside decode rows of another, and a state that was copied."""
    layer, _ = make_twins(arch)
    whole = torch.randn(40, DIM)
    other = torch.randn(8, DIM)
    expected = run(layer, [whole], new_state(arch, 1))
    expected_other = run(layer, [other], new_state(arch, 1))
    state = new_state(arch, 3)
    found, found_other = [], []
    start = 0
    for i, size in enumerate((2, 17, 3, 5, 2, 4, 3, 4)):
        step = run(layer, [other[i : i + 1], whole[start : start + size]], state)
        found_other.append(step[:1])
        found.append(step[1:])
        start += size
        if start == 22:
            for tensor in state:
                tensor[2] = tensor[1]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(found_other), expected_other, rtol=1e-4, atol=1e-5)
    for tensor in state:
        tensor[1] = tensor[2]
    again = run(layer, [other[:1], whole[22:]], state)[1:]
    torch.testing.assert_close(again, expected[22:], rtol=1e-4, atol=1e-5)
