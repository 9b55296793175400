"""A start tells where its time went, and `fill_caches` goes the same way with less of a model."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gllm_engine import LLM, ConfigError, SamplingParams, fill_caches, make_config
from gllm_engine.arch import read_arch
from gllm_engine.arch.formats import CompressedInt, Rounded
from gllm_engine.model import LoadError
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.workers import build_runner
from gllm_engine.workers.build_runner import check_formats, held_formats


def test_the_log_divides_the_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny_model(tmp_path)
    with caplog.at_level(logging.INFO), LLM(str(tmp_path), device="cpu", num_pages=200):
        pass
    (line,) = [line for line in caplog.messages if line.startswith("the model is ready in")]
    parts = "decoder kernels memory graphs first_steps rest_of_the_weights".split()
    times = ", ".join(part.replace("_", " ") + r" \d+\.\d" for part in parts)
    assert re.fullmatch(rf"the model is ready in \d+\.\d s: {times}", line), line


def test_a_process_of_an_engine_imports_no_compiler() -> None:
    """Torch's takes a second of each start."""
    code = "import sys, gllm_engine.workers.worker; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_error_of_a_reader_fails_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file turns out to be cut short only when it is read."""
    write_tiny_model(tmp_path)
    monkeypatch.setattr("os.preadv", lambda *_: 0)
    with pytest.raises(LoadError, match="it ends at byte"):
        LLM(str(tmp_path), device="cpu")


def test_caches_need_a_gpu(tmp_path: Path) -> None:
    for device in ("cpu", "none"):
        with pytest.raises(ConfigError, match="compiled on the GPU they are for"):
            fill_caches(make_config({"model": str(tmp_path), "device": device}))


def test_caches_take_the_config_and_one_layer_of_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "whole", num_hidden_layers=5)
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "whole/config.json", tmp_path / "bare")
    started: list[Any] = []
    monkeypatch.setattr(build_runner, "device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(build_runner, "memory_of_gpu", lambda _: 80 << 30)
    monkeypatch.setattr(build_runner, "load_runner", lambda *given: started.append(given))
    config = make_config({"model": str(tmp_path / "bare"), "page_size": 32})
    assert len(fill_caches(config)) == 2
    ((settled, arch, _),) = started
    assert (settled.load_format, settled.page_size, settled.max_num_seqs) == ("dummy", 32, 1024)
    assert len(arch.layers) == 1 and arch.dim == 64


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


@pytest.mark.parametrize(
    ("load_format", "quantization"), [("auto", "auto"), ("dummy", "auto"), ("auto", "none")]
)
def test_quantised_weights_stored_or_made_up(
    tmp_path: Path, load_format: str, quantization: str
) -> None:
    write_tiny_model(tmp_path, "Qwen3MoeForCausalLM", quantization_config=FP8)
    if load_format == "dummy":
        (tmp_path / "model.safetensors").unlink()
    options = {"load_format": load_format, "quantization": quantization}
    with LLM(str(tmp_path), device="cpu", num_pages=200, **options) as llm:
        (output,) = llm.generate(["the quick brown"], SamplingParams(max_tokens=4, seed=1))
    assert output.error is None and output.outputs[0].token_ids


def test_formats_of_the_checkpoint_and_in_memory(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, quantization_config=FP8)
    plain = replace(read_arch(tmp_path), quantization=())
    stored = read_arch(tmp_path).quantized()
    assert held_formats(stored, "auto") is stored
    assert held_formats(stored, "fp8") is stored
    assert held_formats(plain, "fp8").formats() == {Rounded()}
    assert {str(kind) for kind in held_formats(stored, "none").formats()} == {
        "FP8 in blocks of 16 x 16, held plain"
    }
    assert not held_formats(plain, "none").formats()
    four = replace(plain, quantization=(CompressedInt(32),)).quantized()
    message = "quantization: it is fp8, but weights of the checkpoint are INT4 with a scale per 32"
    with pytest.raises(ConfigError, match=message):
        held_formats(four, "fp8")


def test_a_gpu_must_have_units_for_the_weights(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, quantization_config=FP8 | {"weight_block_size": [16, 24]})
    arch = read_arch(tmp_path)
    check_formats(arch, (8, 0))  # its files may hold plain weights
    needed = r"FP8 in blocks of 16 x 24, which needs .* capability 8.9 or later; this one has 8.0"
    with pytest.raises(ConfigError, match=needed):
        check_formats(arch.quantized(), (8, 0))
    with pytest.raises(ConfigError, match="FP8, rounded when loaded, which needs a GPU"):
        check_formats(arch.rounded(), (8, 0))
    check_formats(arch.quantized().widened(), (8, 0))
    check_formats(arch.rounded(), (9, 0))
    with pytest.raises(ConfigError, match="a multiple of 16 columns"):
        check_formats(arch.quantized(), (9, 0))


@pytest.mark.parametrize("beside", [{}, {"dtype": None}, {"torch_dtype": None}])
def test_the_dtype_is_that_of_the_text_part(tmp_path: Path, beside: dict[str, Any]) -> None:
    text = {"text_config": {"dtype": "float16"}}
    (tmp_path / "config.json").write_text(json.dumps(text | beside))
    config = make_config({"model": str(tmp_path)})
    assert build_runner.weights_dtype(config, on_gpu=True) == torch.float16
    (tmp_path / "config.json").write_text(json.dumps(text | {"torch_dtype": "float32"}))
    assert build_runner.weights_dtype(config, on_gpu=True) == torch.float32
