"""A mixture of experts by itself: what it is, and the parts that ranks hold of it."""

from __future__ import annotations

from dataclasses import replace

import naive_routing
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gllm_engine.arch import Clamp, Moe, Routing
from gllm_engine.layers import MoeFfn, Platform
from gllm_engine.ops import reference
from gllm_engine.parallel import ALONE

PLATFORM = Platform(reference, torch.float32, torch.device("cpu"), ALONE)
DIM = 24
WHOLE = Moe(num_experts=6, hidden=16, routing=Routing(2, True), shared=8, shared_gate=True)
DEEPSEEK = Routing(2, True, "sigmoid", biased=True, groups=3, kept_groups=2, scale=2.5)
NORM = torch.rand(DIM) + 0.5, 1e-5


def make(arch: Moe, source: dict[str, Tensor] | None = None, hidden: slice = slice(None)) -> MoeFfn:
    """`hidden`: of every expert, those channels of the source's weights."""
    layer = MoeFfn(arch, DIM, PLATFORM)
    for name, view in layer.weights().items():
        weight = torch.randn(view.shape) if source is None else source[name]
        if "expert" in name and "shared_expert_gate" not in name and "down_proj.bias" not in name:
            weight = weight[:, hidden] if "down_proj" in name else weight[hidden]
        view.copy_(weight)
    return layer


def by_hand(arch: Moe, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Token by token, straight from the definition."""

    def gated(part: str, y: Tensor) -> Tensor:
        gate, up, down = (weights[f"mlp.{part}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        return down @ (F.silu(gate @ y) * (up @ y))

    rows = []
    for row in F.rms_norm(x, (DIM,), *NORM):
        logits = weights["mlp.gate.weight"] @ row
        bias = weights.get("mlp.gate.e_score_correction_bias")
        biases = None if bias is None else bias.tolist()
        chosen = naive_routing.route(logits.tolist(), arch.routing, biases)
        out = sum(weight * gated(f"experts.{e}", row) for e, weight in chosen.items())
        if arch.shared:
            shared = gated("shared_expert", row)
            if arch.shared_gate:
                shared *= torch.sigmoid(weights["mlp.shared_expert_gate.weight"] @ row)
            out = out + shared
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "arch",
    [
        WHOLE,
        replace(WHOLE, shared=0, shared_gate=False, routing=Routing(3, renorm=False)),
        replace(WHOLE, shared_gate=False, routing=DEEPSEEK),
    ],
)
def test_the_definition(arch: Moe) -> None:
    layer, x = make(arch), torch.randn(5, DIM)
    assert {k: v.shape for k, v in layer.weights().items()} == arch.weights(DIM)
    expected = by_hand(arch, layer.weights(), x)
    torch.testing.assert_close(layer(x, NORM), expected, rtol=1e-4, atol=1e-4)
    total = x.clone()  # as in the decoder: what comes in is what is added to
    assert layer(total, NORM, total) is total
    torch.testing.assert_close(total, x + expected, rtol=1e-4, atol=1e-4)
    assert layer(x[:0], NORM).shape == (0, DIM)


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 6), max_size=4),
    shared_at=st.integers(0, 2),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_parts_of_ranks_sum_to_the_whole(
    cuts: list[int], shared_at: int, tokens: int, seed: int
) -> None:
    """Any cut of the experts into ranges, some of them empty; one rank has the shared expert."""
    torch.manual_seed(seed)
    whole, x = make(WHOLE), torch.randn(tokens, DIM)
    edges = [0, *sorted(cuts), 6]
    parts = []
    for rank, (first, end) in enumerate(zip(edges, edges[1:], strict=False)):
        shared = WHOLE.shared if rank == min(shared_at, len(cuts)) else 0
        arch = replace(
            WHOLE, local_experts=(first, end - first), shared=shared, shared_gate=shared > 0
        )
        parts.append(make(arch, whole.weights())(x, NORM))
    torch.testing.assert_close(sum(parts), whole(x, NORM), rtol=1e-4, atol=1e-4)


def test_slices_of_every_hidden_sum_to_the_whole() -> None:
    whole, x = make(replace(WHOLE, shared=16)), torch.randn(7, DIM)
    parts = [
        make(replace(WHOLE, hidden=n, shared=n), whole.weights(), slice(at, at + n))(x, NORM)
        for at, n in ((0, 4), (4, 12))
    ]
    torch.testing.assert_close(sum(parts), whole(x, NORM), rtol=1e-4, atol=1e-4)


def test_a_token_whose_experts_are_elsewhere_gets_zeros() -> None:
    weights = make(WHOLE).weights()
    layer, x = (
        make(replace(WHOLE, local_experts=(2, 1), shared=0, shared_gate=False), weights),
        torch.randn(40, DIM),
    )
    logits = F.rms_norm(x, (DIM,), *NORM) @ weights["mlp.gate.weight"].T
    here = (logits.topk(2).indices == 2).any(1)
    assert 0 < here.sum() < 40
    assert torch.equal(layer(x, NORM).abs().sum(1) > 0, here)


def test_slices_of_experts_with_biases_sum_to_the_whole() -> None:
    """The bias of the output is added once."""
    arch = replace(WHOLE, shared=0, shared_gate=False, bias=True, out_bias=True)
    whole, x = make(arch), torch.randn(7, DIM)
    parts = [
        make(replace(arch, hidden=n, out_bias=at == 0), whole.weights(), slice(at, at + n))(x, NORM)
        for at, n in ((0, 4), (4, 12))
    ]
    torch.testing.assert_close(sum(parts), whole(x, NORM), rtol=1e-4, atol=1e-4)


def test_llama4s_mixture() -> None:
    """Weights on the input, one expert chosen by logit, a shared expert without a gate."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    sizes = {"hidden_size": DIM, "intermediate_size": 16, "num_local_experts": 6}
    for top_k in (1, 2):
        config = transformers.Llama4TextConfig(**sizes, num_experts_per_tok=top_k)
        theirs = randomized(Llama4TextMoe(config))
        arch = Moe(6, 16, Routing(top_k, False, "sigmoid"), shared=16, on_input=True)
        state = theirs.state_dict()
        weights = {"mlp.gate.weight": state["router.weight"]}
        for part in ("gate_proj", "up_proj", "down_proj"):
            weights[f"mlp.shared_expert.{part}.weight"] = state[f"shared_expert.{part}.weight"]
        for e in range(6):
            gate, up = state["experts.gate_up_proj"][e].T.chunk(2)
            weights |= expert(e, gate, up, state["experts.down_proj"][e].T)
        x = torch.randn(9, DIM)
        torch.testing.assert_close(make(arch, weights)(x, None), theirs(x)[0], rtol=1e-4, atol=1e-4)
        wrong = make(replace(arch, on_input=False), weights)(x, None)
        assert (wrong - theirs(x)[0]).abs().max() > 0.1


def test_gpt_oss_mixture() -> None:
    """Biases of the router and of the experts, a clamped activation, softmax over the chosen."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    sizes = {"hidden_size": DIM, "intermediate_size": 16, "num_local_experts": 6}
    config = transformers.GptOssConfig(**sizes, num_experts_per_tok=2, swiglu_limit=2.0)
    theirs = randomized(GptOssMLP(config))
    arch = Moe(6, 16, Routing(2, True), router_bias=True, bias=True, out_bias=True)
    arch = replace(arch, clamp=Clamp(2.0, 1.702))
    state = theirs.state_dict()
    weights = {f"mlp.gate.{leaf}": state[f"router.{leaf}"] for leaf in ("weight", "bias")}
    for e in range(6):
        gate_up, bias = state["experts.gate_up_proj"][e].T, state["experts.gate_up_proj_bias"][e]
        weights |= expert(e, gate_up[::2], gate_up[1::2], state["experts.down_proj"][e].T)
        down = state["experts.down_proj_bias"][e]
        weights |= expert(e, bias[::2], bias[1::2], down, leaf="bias")
    x = torch.randn(9, DIM)
    expected = theirs(x[None])[0][0]
    torch.testing.assert_close(make(arch, weights)(x, None), expected, rtol=1e-4, atol=1e-4)
    for change in (
        {"clamp": None},
        {"clamp": Clamp(3.0, 1.702)},
        {"clamp": Clamp(2.0, 1.0)},
        {"bias": False},
        {"out_bias": False},
        {"router_bias": False},
    ):
        wrong = make(replace(arch, **change), weights)(x, None)
        assert (wrong - expected).abs().max() > 0.1, change


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.requires_grad_(False).parameters():
        parameter.normal_()
    return module.float().eval()


def expert(
    number: int, gate: Tensor, up: Tensor, down: Tensor, leaf: str = "weight"
) -> dict[str, Tensor]:
    parts = {"gate": gate, "up": up, "down": down}
    return {f"mlp.experts.{number}.{part}_proj.{leaf}": t for part, t in parts.items()}
