"""Cache groups: each layer in one, of a window of its own, equal in size, one with all tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gllm_engine.arch import Model, cache_groups, make_arch
from gllm_engine.arch.tiny import tiny_config


def make_model(windows: list[int | None]) -> Model:
    model = make_arch(tiny_config("LlamaForCausalLM") | {"num_hidden_layers": len(windows)})
    return model.each(mixer=lambda i, layer: replace(layer.mixer, window=windows[i]))


GEMMA_27B = ([1024] * 5 + [None]) * 10 + [1024, 1024]
CASES = {
    "no window": ([None] * 32, [(None, 32)]),
    "every other layer": ([128, None] * 12, [(128, 12), (None, 12)]),
    "every sixth layer": (GEMMA_27B, [*[(1024, 11)] * 2, *[(1024, 10)] * 3, (None, 10)]),
    "chunks": (([8192] * 3 + [None]) * 12, [*[(8192, 12)] * 3, (None, 12)]),
    "all layers": ([4096] * 32, [(4096, 32), (None, 0)]),
    "two windows": ([512, 64] * 8, [(512, 8), (64, 8), (None, 0)]),
}


@pytest.mark.parametrize("case", CASES)
def test_groups(case: str) -> None:
    windows, expected = CASES[case]
    groups = cache_groups(make_model(windows), 100_000)
    assert [(group.window, len(group.layers)) for group in groups] == expected
    assert sorted(i for group in groups for i in group.layers) == list(range(len(windows)))
    assert all(windows[i] == group.window for group in groups for i in group.layers)


def test_a_window_as_long_as_any_sequence_is_none() -> None:
    model = make_model([512, None] * 4)
    assert len(cache_groups(model, 512)) == 1
    assert len(cache_groups(model, 513)) == 2


def test_every_stage_of_a_pipeline_has_layers_of_all_groups() -> None:
    groups = cache_groups(make_model(GEMMA_27B), 100_000)
    for first, end in ((0, 31), (31, 62)):
        counts = [sum(first <= i < end for i in group.layers) for group in groups]
        assert max(counts) <= 6
