"""Output projections and embeddings in formats: logits are those of transformers for the exact
numbers that are stored, on one rank and on several.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import Tensors, block, check, compressed, load_held, refusal, rewrite, write
from safetensors.torch import load_file, save_file
from test_integers import AWQ, GPTQ, REORDERED, int4
from test_uneven_shares import on_all_ranks
from tiny_models import CPU, all_logits, load, some_tokens
from torch import Tensor

from gllm_engine.arch import ArchError, Model, Shard, read_arch
from gllm_engine.arch.formats import Formats, Widened
from gllm_engine.arch.model import EMBEDDING, HEAD
from gllm_engine.layers import stacked_weight, stored_integers
from gllm_engine.model import Decoder, fill_randomly, kernels_of
from gllm_engine.model.encode import in_formats
from gllm_engine.model.tiny import random_checkpoint
from gllm_engine.ops import Fp8Weight, Weight, dequantized
from gllm_engine.parallel import TensorParallel

FP8 = {"quant_method": "fp8"}
INT8 = GPTQ | {"bits": 8, "sym": False}


def write_vocabulary(
    path: Path, family: str, config: dict[str, Any], *names: str, **over: Any
) -> Path:
    """A checkpoint of which the matrices `names` have the format of `config` too."""
    model = write(path, family, config, **over)
    arch = read_arch(model)
    formats: Formats = tuple((name, arch.quantization[0]) for name in names)
    arch = replace(arch.quantized(), vocab_formats=formats)
    plain = random_checkpoint(arch.with_formats({}), seed=3)
    save_file(in_formats(arch, plain, torch.float32), model / "model.safetensors")
    return model


CASES = [
    ("LlamaForCausalLM", FP8, ".weight_scale", (0, 0)),
    ("LlamaForCausalLM", compressed("tensor"), ".weight_scale", (0, 0)),
    ("LlamaForCausalLM", compressed("channel"), ".weight_scale", (1, 0)),
    ("Qwen3ForCausalLM", block(16, 32), ".weight_scale_inv", (16, 32)),
    ("LlamaForCausalLM", GPTQ | {"lm_head": True}, ".qweight", (0, 0)),
    ("Qwen3MoeForCausalLM", REORDERED, ".g_idx", (0, 0)),
    ("LlamaForCausalLM", AWQ, ".qzeros", (0, 0)),
    ("LlamaForCausalLM", int4(), ".weight_packed", (0, 0)),
    ("GPTNeoXForCausalLM", INT8, ".qweight", (0, 0)),
]


@pytest.mark.parametrize(("family", "config", "beside", "size"), CASES)
def test_output_projections(
    tmp_path: Path, family: str, config: dict[str, Any], beside: str, size: tuple[int, int]
) -> None:
    model = write_vocabulary(tmp_path / "model", family, config, HEAD, tie_word_embeddings=False)
    module = "embed_out" if family == "GPTNeoXForCausalLM" else "lm_head"
    assert module + beside in load_file(model / "model.safetensors")
    check(model, size)
    decoder = load(model)
    assert decoder._head.shape == (384, 64)
    is_plain = isinstance(dict(decoder.arch.vocab_formats)[HEAD], Widened)
    assert is_plain == isinstance(decoder._head, Tensor) == (config in (INT8, REORDERED))
    fill_randomly(decoder)
    assert all_logits(decoder, some_tokens(9)).std() > 0.05


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("config", "size"),
    [(compressed("channel"), (1, 0)), (int4(), (0, 0)), (block(16, 32), (16, 32)), (GPTQ, (0, 0))],
)
def test_embeddings(
    tmp_path: Path,
    config: dict[str, Any],
    size: tuple[int, int],
    tied: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = (EMBEDDING,) if tied else (EMBEDDING, HEAD)
    model = write_vocabulary(
        tmp_path / "model", "LlamaForCausalLM", config, *names, tie_word_embeddings=tied
    )
    with caplog.at_level(logging.WARNING):
        decoder = load(model)
    assert "as they are stored: " in caplog.text
    assert f", held plain ({EMBEDDING})" in caplog.text
    assert decoder._embedding.dtype == torch.float32
    assert isinstance(decoder._head, Tensor) == tied
    check(model, size)


@pytest.mark.parametrize("config", [compressed("channel"), block(16, 32), FP8])
def test_embeddings_are_converted_in_parts(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their numbers in 32 bits would take several times the memory of the embedding."""
    model = write_vocabulary(
        tmp_path, "LlamaForCausalLM", config, EMBEDDING, tie_word_embeddings=True
    )
    whole = load(model)._embedding.clone()
    sizes = []

    def keep(weight: Weight, dtype: torch.dtype) -> Tensor:
        sizes.append(len(weight))
        return dequantized(weight, dtype)

    monkeypatch.setattr(stacked_weight, "dequantized", keep)
    monkeypatch.setattr(stored_integers, "_AT_ONCE", 50 * 64)
    assert torch.equal(load(model)._embedding, whole)
    assert sizes == [50] * 7 + [34]


SPLIT = [
    (compressed("channel"), 384, 2),
    (compressed("channel"), 389, 4),
    (block(16, 32), 389, 4),  # parts begin inside blocks
    (FP8, 389, 4),
    (GPTQ, 384, 4),
    (AWQ, 392, 4),
    (INT8, 392, 4),
    (int4(), 389, 4),
]


@pytest.mark.parametrize(("config", "vocab", "size"), SPLIT)
@pytest.mark.parametrize("tied", [True, False])
def test_ranks_share_the_vocabulary(
    tmp_path: Path, config: dict[str, Any], vocab: int, size: int, tied: bool
) -> None:
    """An embedding's rows past the vocabulary are zero, and so are an output projection's."""
    names = (EMBEDDING,) if tied else (EMBEDDING, HEAD)
    model = write_vocabulary(
        tmp_path,
        "LlamaForCausalLM",
        config,
        *names,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        intermediate_size=256,
        num_attention_heads=4,
        head_dim=32,
    )
    expected = all_logits(load(model), some_tokens(24))
    assert expected.std() > 1
    for logits in on_all_ranks(model, size, lambda decoder: all_logits(decoder, some_tokens(24))):
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


def test_rows_past_the_vocabulary(tmp_path: Path) -> None:
    model = write_vocabulary(tmp_path, "LlamaForCausalLM", FP8, HEAD, vocab_size=389)
    with torch.inference_mode():
        ranks = TensorParallel(3, 4, CPU, None, True)
        decoder = load_held(model, lambda arch: arch, shard=Shard(0, 2, 3, 4), ranks=ranks)
    assert isinstance(decoder._head, Fp8Weight) and decoder._head.shape == (104, 64)
    rest = decoder._head.dequantized(torch.float32)[77:]
    assert len(rest) == 27 and not rest.any()
    assert decoder.weights()["lm_head.weight"].shape == (77, 64)


def test_stages_hold_what_they_need(tmp_path: Path) -> None:
    model = write_vocabulary(tmp_path, "LlamaForCausalLM", FP8, EMBEDDING, HEAD)
    arch = load(model).arch
    first = Shard(0, 1).weights(arch)
    last = Shard(1, 2).weights(arch)
    outer = {"model.embed_tokens.weight", "model.embed_tokens.weight_scale"}
    assert {name for name in first if "layers" not in name} == outer
    outer = {"model.norm.weight", "lm_head.weight", "lm_head.weight_scale"}
    assert {name for name in last if "layers" not in name} == outer


def test_held_plain_on_request(tmp_path: Path) -> None:
    """`quantization: none`."""
    model = write_vocabulary(tmp_path, "LlamaForCausalLM", GPTQ, HEAD)
    plain = load_held(model, Model.widened)
    assert isinstance(plain._head, Tensor)
    assert torch.equal(all_logits(plain, some_tokens(9)), all_logits(load(model), some_tokens(9)))


def test_kernels_are_told(tmp_path: Path) -> None:
    arch = load(write_vocabulary(tmp_path, "LlamaForCausalLM", GPTQ, HEAD)).arch
    uses = kernels_of(arch.layers, torch.bfloat16, torch.bfloat16, arch.vocab_formats[0][1])
    assert uses[-1].part == "output projection, GPTQ INT4 with a scale per 32 columns"
    assert uses[-1].kernels["hopper"].startswith("Triton; for more than")


def test_what_is_refused(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    tied = {"tie_word_embeddings": True}
    model = write_vocabulary(tmp_path / "tied", "LlamaForCausalLM", config, EMBEDDING, **tied)
    rewrite(model, lambda tensors: tensors.update({"lm_head.weight": torch.ones(384, 64)}))
    message = "tensor lm_head.weight is stored beside a quantised embedding, but the config says"
    assert message in refusal(model)
    model = write_vocabulary(tmp_path / "rows", "LlamaForCausalLM", AWQ, HEAD, vocab_size=264)
    arch = load(model).arch
    with pytest.raises(ArchError, match="rows of lm_head.weight would be split into parts of 6"):
        Shard(0, 2, 0, 44).vocab_formats(arch)
    config = write_vocabulary(tmp_path / "other", "LlamaForCausalLM", FP8, HEAD) / "config.json"
    values = json.loads(config.read_text())
    other = values | {"quantization_config": compressed("channel")}
    config.write_text(json.dumps(other))
    assert "is FP8 with one scale, but the config's quantization_config" in refusal(config.parent)
    tensors: Tensors = load_file(config.parent / "model.safetensors")
    config.write_text(json.dumps(values))
    del tensors["lm_head.weight_scale"]
    save_file(tensors, config.parent / "model.safetensors")
    assert "tensor lm_head.weight has dtype F8_E4M3 and none of" in refusal(config.parent)


def test_every_stored_number_matters(tmp_path: Path) -> None:
    model = write_vocabulary(tmp_path, "LlamaForCausalLM", AWQ, HEAD)
    right = all_logits(load(model), some_tokens(9))
    for own in ("qweight", "qzeros", "scales"):
        whole = load_file(model / "model.safetensors")
        other = {f"lm_head.{own}": whole[f"lm_head.{own}"].flip(0, 1).contiguous()}
        rewrite(model, lambda tensors, other=other: tensors.update(other))
        assert (all_logits(load(model), some_tokens(9)) - right).abs().max() > 0.1
        save_file(whole, model / "model.safetensors")


def test_the_decoder_counts_their_memory(tmp_path: Path) -> None:
    arch = load(write_vocabulary(tmp_path, "LlamaForCausalLM", AWQ, HEAD, vocab_size=392)).arch
    decoder = Decoder(arch, dtype=torch.bfloat16, device=torch.device("meta"), max_model_len=64)
    assert decoder.weight_bytes()["lm_head.weight"] < 0.7 * 392 * 64 * 2
