"""`check_model` refuses what a start refuses, and reads no weights."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gllm_client.check import lines
from gllm_engine import LLM, CheckReport, ConfigError, SamplingParams, check_model, make_config
from gllm_engine.arch import ArchError, read_arch
from gllm_engine.arch.names import checkpoint_shapes
from gllm_engine.model.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
DOWN = "model.layers.1.mlp.down_proj.weight"
Change = Callable[[Path], object]


def check(path: Path, gpu_gib: float | None = None, **config: Any) -> CheckReport:
    size = None if gpu_gib is None else int(gpu_gib * GIB)
    return check_model(make_config({"model": str(path)} | config), size)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def rewrite(path: Path) -> None:
        file = path / "model.safetensors"
        found = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(found)
        save_file(found, file)

    return rewrite


def settings(**over: Any) -> Change:
    def rewrite(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | over))

    return rewrite


def nothing(path: Path) -> None:
    assert path.is_dir()


def write_tiny_sharing(path: Path, layers: int = 2) -> None:
    """Every other layer uses the choice of the one before."""
    types = ["full", "shared"] * (layers // 2)
    write_tiny_model(path, "GlmMoeDsaForCausalLM", num_hidden_layers=layers, indexer_types=types)


def write_longer_sharing(path: Path) -> None:
    write_tiny_sharing(path, 4)


REFUSED: dict[str, tuple[Change, dict[str, Any], str]] = {
    "family": (settings(architectures=["NoSuchModel"]), {}, "NoSuchModel"),
    "key": (settings(hidden_act="tanh"), {}, "hidden_act"),
    "missing": (tensors(lambda t: t.pop(DOWN)), {}, f"{DOWN} is missing"),
    "left over": (tensors(lambda t: t.update(x=torch.ones(2))), {}, "tensor x is left over"),
    "shape": (tensors(lambda t: t.update({DOWN: torch.ones(2, 3)})), {}, f"{DOWN} has shape"),
    "dtype": (tensors(lambda t: t.update({DOWN: t[DOWN].long()})), {}, f"{DOWN} has dtype"),
    "cut short": (
        lambda path: os.truncate(path / "model.safetensors", 50_000), {}, "not a complete"
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), {}, "is there"),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), {}, "has no tokenizer"),
    "ranks": (nothing, {"tensor_parallel_size": 3}, "3 does not divide"),
    "stages": (nothing, {"pipeline_parallel_size": 9}, "9 is more than the 2 layers"),
    "cut": (
        nothing, {"pipeline_parallel_size": 2, "assigned_layers": "1,2"}, "is 3 layers"
    ),
    "stages of one run": (
        write_tiny_sharing, {"pipeline_parallel_size": 2}, "a stage can only begin with layer 0"
    ),
    "cut of a run": (
        write_longer_sharing, {"pipeline_parallel_size": 2, "assigned_layers": "1,3"},
        "lets a stage begin with layer 1: layers that attend to the tokens that an earlier layer "
        "has chosen must be in its stage, and layers that add embeddings of images in the first, "
        "so a stage can only begin with layer 0, 2",
    ),
    "windows": (
        partial(write_tiny_model, family="Gemma2ForCausalLM"),
        {"pipeline_parallel_size": 2, "spare_layers": 1},
        "spare_layers: 1 is more than 0, but layers of this model see different windows",
    ),
    "text": (
        nothing, {"encoder_workers": 2},
        "encoder_workers: 2 is for a model that takes images, and this one takes text alone",
    ),
    "length": (nothing, {"max_model_len": 10**6}, "max_model_len: 1000000 is more than"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "config", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_are_those_of_a_start(
    tmp_path: Path, change: Change, config: dict[str, Any], problem: str
) -> None:
    change(write_tiny_model(tmp_path))
    with pytest.raises(ValueError) as started:
        LLM(str(tmp_path), device="cpu", **config)
    with pytest.raises(ValueError) as checked:
        check(tmp_path, device="cpu", **config)
    assert str(checked.value) == str(started.value) and problem in str(checked.value)
    assert type(checked.value) is type(started.value)


def test_a_report_of_a_cpu_is_what_a_start_has(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "Gemma2ForCausalLM")
    config: dict[str, Any] = {"device": "cpu", "kv_cache_gib": 0.002, "max_num_seqs": 2}
    report = check(tmp_path, **config)
    with LLM(str(tmp_path), **config) as llm:
        info = llm.engine.info
    assert (report.num_pages, report.page_size) == (info.num_pages, info.page_size)
    assert report.max_model_len == info.max_model_len
    assert report.gpu_memory is report.stages[0].free is None
    assert report.num_params == read_arch(tmp_path).num_params()
    assert {group.window is None for group in report.groups} == {True, False}
    assert sum(group.layers for group in report.groups) == len(read_arch(tmp_path).layers)


def write_headers(path: Path) -> int:
    """A checkpoint of the right tensors in bf16 whose data are holes; returns its size."""
    header = {}
    end = 0
    for name, shape in checkpoint_shapes(read_arch(path)).items():
        begin = end
        end += 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file = path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)
    return end


def test_a_large_model_is_checked_by_its_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large"
    shutil.copytree(write_tiny_model(tmp_path / "tiny"), path)
    shutil.copy(ROOT / "benchmarks/models/qwen3-30b-a3b/config.json", path)
    size = write_headers(path)
    assert size > 60e9

    def unexpected(*_: object) -> int:
        raise AssertionError("weights are read")

    monkeypatch.setattr(os, "preadv", unexpected)
    config = {"device": "cuda", "tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    seqs = {"max_num_seqs": 8, "max_num_batched_tokens": 1024}
    report = check(path, 40, **config | seqs)
    held = [sum(stage.weights.values()) for stage in report.stages]
    assert size / 8 < sum(held) / 2 < 1.02 * size / 8
    assert [stage.ranks for stage in report.stages] == [4, 4] and report.cut_is_estimated
    assert all(0 <= (stage.free or 0) < 6 * GIB for stage in report.stages)
    assert report.cached_tokens == report.num_pages * report.page_size > 500_000
    assert report.sequences == report.num_pages // report.groups[0].pages
    with pytest.raises(ConfigError, match="leaves no room for a KV cache"):
        check(path, 8, **config | seqs)


def test_only_the_config_is_needed_for_random_weights(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "tiny/config.json", tmp_path / "bare")
    assert check(tmp_path / "bare", device="cpu", load_format="dummy").num_pages
    with pytest.raises(ValueError, match="has no tokenizer"):
        check(tmp_path / "bare", device="cpu")


def test_the_device_fits_the_memory(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    with pytest.raises(ConfigError, match="^device: it is cpu, so the memory of a GPU"):
        check(tmp_path, 80, device="cpu")
    with pytest.raises(ConfigError, match="^device: none runs no model"):
        check(tmp_path, 80, device="none")


def test_slots_of_a_model_with_states_are_those_of_a_start(tmp_path: Path) -> None:
    """Their states take a quarter of a GPU at most."""
    large = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    heads = {"linear_num_value_heads": 64, "linear_num_key_heads": 64}
    write_tiny_model(tmp_path, "Qwen3NextForCausalLM", **large, **heads)
    config = {"device": "cuda", "max_num_batched_tokens": 1024}
    found = check(tmp_path, 8, **config)
    assert GIB < found.stages[0].states <= 2.1 * GIB
    assert found != check(tmp_path, 8, max_num_seqs=1, **config)


def test_encoders_are_told(tmp_path: Path) -> None:
    """By `gllm check`, too."""
    write_tiny_model(tmp_path, "Qwen3VLForConditionalGeneration")
    for size, device in ((8, "cuda"), (None, "cpu")):
        found = check(tmp_path, size, device=device, encoder_workers=2)
        assert found.encoder is not None and found.encoder.encoders == 2
        assert "vision tower" not in found.stages[0].weights and found.encoder.weights > 0
        told = "\n".join(lines(found))
        assert bool(re.search(r"^encoders \(estimate\) +1\.0", told, re.MULTILINE)) == bool(size)
        assert "GiB of each encoder" in told and ("largest image" in told) == (device == "cuda")
    assert check(tmp_path, device="cpu").encoder is None


def test_unknown_keys_are_refused(tmp_path: Path) -> None:
    many = {f"a_key_with_a_long_name_{number}": 1 for number in range(10)}
    write_tiny_model(tmp_path / "many", **many)
    with pytest.raises(ArchError, match=f"arithmetic: {', '.join(many)}; name"):
        check(tmp_path / "many", device="cpu")
    write_tiny_model(tmp_path, some_scale=3.0, a_gate="on")
    file = re.escape(str(tmp_path / "config.json"))
    unknown = f"{file}: unknown keys, which may change the model's arithmetic: "
    advice = "; name those that have no effect in ignored_config_keys"
    for ignored, problem in (
        ((), f"{unknown}a_gate, some_scale{advice}"),
        (("some_scale",), f"{unknown}a_gate{advice}"),
        (
            ("a_gate", "some_scale", "vocab_size", "vocab"),
            f"ignored_config_keys: vocab_size, vocab: {file} has no such unknown keys",
        ),
    ):
        with pytest.raises(ArchError, match=f"^{problem}$"):
            check(tmp_path, device="cpu", ignored_config_keys=ignored)
        with pytest.raises(ArchError, match=f"^{problem}$"):
            LLM(str(tmp_path), device="none", ignored_config_keys=ignored)
    with LLM(str(tmp_path), device="none", ignored_config_keys=("a_gate", "some_scale")) as llm:
        assert llm.generate([[5, 6]], SamplingParams(max_tokens=2))
