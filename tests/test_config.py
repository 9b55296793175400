"""What the configuration leaves to the device."""

from __future__ import annotations

import pytest

from gllm_engine.config import ConfigError, EngineConfig, make_config, settle


def chosen(on_gpu: bool, **values: int) -> tuple[int, int, int]:
    config = settle(EngineConfig(model=".", **values), on_gpu)
    return config.max_num_seqs, config.max_num_batched_tokens, config.plans_in_flight


def test_defaults_fit_the_device() -> None:
    assert chosen(False) == (256, 2048, 1)
    assert chosen(True) == (1024, 8192, 2)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_was_asked_for_stays(on_gpu: bool) -> None:
    asked = {"max_num_seqs": 7, "max_num_batched_tokens": 70, "plans_in_flight": 3}
    assert chosen(on_gpu, **asked) == (7, 70, 3)


def test_one_default_gives_way_to_the_other_number() -> None:
    assert chosen(False, max_num_batched_tokens=16)[:2] == (16, 16)
    assert chosen(False, max_num_seqs=4096)[:2] == (4096, 4096)


def test_too_few_tokens_are_refused(tmp_path) -> None:
    values = {"model": str(tmp_path), "max_num_seqs": 8, "max_num_batched_tokens": 7}
    with pytest.raises(ConfigError, match="max_num_batched_tokens: 7 is less than"):
        make_config(values)
