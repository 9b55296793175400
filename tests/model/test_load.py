"""A checkpoint that does not fit is refused with one sentence that names file and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loaded import load_model
from safetensors.torch import load_file, save_file
from tiny_models import all_logits, load, some_tokens
from torch import Tensor

from gllm_engine.arch import read_arch
from gllm_engine.arch.model import SELECTION_BIAS
from gllm_engine.arch.names import (
    checkpoint_name,
    checkpoint_shapes,
    checkpoint_tensors,
    with_stored_names,
)
from gllm_engine.model import Decoder, LoadError, fill_randomly
from gllm_engine.model.tiny import write_tiny_model

Tensors = dict[str, Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def rewrite(model: Path, change: Callable[[Tensors], object]) -> None:
    file = model / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def shard(model: Path) -> dict[str, str]:
    """Split in two files, by turns; returns the weight map."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    files: dict[str, Tensors] = {"a.safetensors": {}, "b.safetensors": {}}
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        weight_map[name] = "ab"[i % 2] + ".safetensors"
        files[weight_map[name]][name] = tensor.clone()
    for file, part in files.items():
        save_file(part, model / file)
    write_index(model, weight_map)
    return weight_map


def write_index(model: Path, weight_map: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (model / "model.safetensors.index.json").write_text(text)


def refusal(model: Path) -> str:
    with pytest.raises(LoadError) as caught:
        load(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing(model: Path) -> None:
    rewrite(model, lambda t: t.pop(DOWN))
    assert refusal(model) == f"{model}: tensor {DOWN} is missing"


def test_missing_several(model: Path) -> None:
    rewrite(model, lambda t: [t.pop(n) for n in (DOWN, "model.norm.weight", "lm_head.weight")])
    assert refusal(model) == f"{model}: tensor {DOWN} is missing (and 2 more)"


def test_left_over(model: Path) -> None:
    rewrite(model, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    file = model / "model.safetensors"
    assert refusal(model) == (
        f"{file}: tensor model.layers.0.self_attn.q_proj.bias is left over; "
        "the model has no place for it"
    )


def test_layers_for_multi_token_prediction_are_skipped(tmp_path: Path) -> None:
    """As many as the config says; one more is left over."""
    model = write_tiny_model(tmp_path, "Glm4MoeForCausalLM", num_nextn_predict_layers=2)
    expected = all_logits(load(model), some_tokens(20))
    names = ("eh_proj.weight", "shared_head.head.weight", "mlp.experts.0.up_proj.weight")
    for name in names:
        rewrite(model, lambda t, n=name: t.update({f"model.layers.2.{n}": torch.ones(3)}))
        rewrite(model, lambda t, n=name: t.update({f"model.layers.3.{n}": torch.ones(3)}))
    torch.testing.assert_close(all_logits(load(model), some_tokens(20)), expected)
    rewrite(model, lambda t: t.update({"model.layers.4.eh_proj.weight": torch.ones(3)}))
    assert "tensor model.layers.4.eh_proj.weight is left over" in refusal(model)


def test_one_tensor_for_all_experts_of_a_layer(tmp_path: Path) -> None:
    """[experts, rows, columns] gives the same model as a tensor for each expert."""
    model = write_tiny_model(tmp_path, "Qwen3NextForCausalLM")
    expected = all_logits(load(model), some_tokens(20))
    arch = read_arch(model)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    fused = with_stored_names(arch, {name})
    shapes = checkpoint_shapes(fused)
    stored, tensors = load_file(model / "model.safetensors"), {}
    for tensor, parts in checkpoint_tensors(fused).items():
        if tensor in stored:
            tensors[tensor] = stored[tensor]
        else:
            weights = [stored[checkpoint_name(arch, part)] for part in parts]
            tensors[tensor] = torch.cat(weights).view(shapes[tensor])
    assert tensors[name].dim() == 3 and tensors.keys() != stored.keys()
    save_file(tensors, model / "model.safetensors")
    torch.testing.assert_close(all_logits(load(model), some_tokens(20)), expected)


def test_a_selection_bias_is_not_rounded(tmp_path: Path) -> None:
    model, name = (
        write_tiny_model(tmp_path, "Glm4MoeForCausalLM"),
        f"model.layers.1.{SELECTION_BIAS}",
    )
    stored = load_file(model / "model.safetensors")[name]
    options = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "max_model_len": 64}
    held = load_model(model, read_arch(model), **options).weights()[name]
    assert torch.equal(held, stored) and not torch.equal(held.bfloat16().float(), stored)


KV_SCALES = ["k_scale", "v_proj.output_scale", "k_proj.k_scale", "kv_scale", "q_scale"]


@pytest.mark.parametrize("name", [*KV_SCALES, "q_proj.q_scale", "k_proj.output_zero_point"])
def test_scales_of_a_quantised_cache(
    model: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """K and V are stored without scales; a user is told so."""
    caplog.set_level("INFO")
    name = f"model.layers.0.self_attn.{name}"
    rewrite(model, lambda t: t.update({name: torch.tensor(0.02)}))
    load(model)
    assert f"{model}: scales of a float8 KV cache are not used" in caplog.text
    rewrite(model, lambda t: t.update({name: torch.ones(2)}))
    assert f"tensor {name} is left over; the model has no place for it" in refusal(model)


def test_rope_tables_of_old_checkpoints_are_known(model: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(model, lambda t: t.update({name: torch.ones(8)}))
    for table in ("cos_cached", "sin_cached"):
        cached = name.replace("inv_freq", table)
        rewrite(model, lambda t, cached=cached: t.update({cached: torch.ones(1, 1, 64, 16)}))
    load(model)
    rewrite(model, lambda t: t.update({name + "_2": torch.ones(8)}))
    assert "is left over" in refusal(model)


def test_shape(model: Path) -> None:
    rewrite(model, lambda t: t.update({DOWN: torch.ones(64, 97)}))
    assert refusal(model) == (
        f"{model / 'model.safetensors'}: tensor {DOWN} has shape [64, 97], "
        "the config asks for [64, 96]"
    )


def test_transposed(model: Path) -> None:
    rewrite(model, lambda t: t.update({DOWN: t[DOWN].T.contiguous()}))
    assert "has shape [96, 64], the config asks for [64, 96]" in refusal(model)


def test_dtype(model: Path) -> None:
    rewrite(model, lambda t: t.update({DOWN: t[DOWN].to(torch.int16)}))
    assert f"tensor {DOWN} has dtype I16; supported: F64, F32, F16, BF16" in refusal(model)
    rewrite(model, lambda t: t.update({DOWN: t[DOWN].to(torch.int8)}))
    assert f"tensor {DOWN} has dtype I8 and none of {DOWN}_scale" in refusal(model)


@pytest.mark.parametrize("keep", [4, 100, 5000, -1])
def test_truncated(model: Path, keep: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert refusal(model).startswith(f"{file}: not a complete safetensors file (")


def test_no_checkpoint(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(model)


def test_sharded(model: Path) -> None:
    tokens = some_tokens(9)
    whole = all_logits(load(model), tokens)
    shard(model)
    torch.testing.assert_close(all_logits(load(model), tokens), whole, rtol=0, atol=0)


def test_shard_missing(model: Path) -> None:
    shard(model)
    (model / "b.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    assert refusal(model) == f"{index}: names b.safetensors, which is not a file in {model}"


def test_shard_lacks_a_tensor(model: Path) -> None:
    weight_map = shard(model)
    file = model / weight_map[DOWN]
    tensors = {name: t.clone() for name, t in load_file(file).items() if name != DOWN}
    save_file(tensors, file)
    assert refusal(model) == f"{model}: tensor {DOWN} is missing"


def test_tensor_in_two_shards(model: Path) -> None:
    weight_map = shard(model)
    other = model / ("a.safetensors" if weight_map[DOWN] == "b.safetensors" else "b.safetensors")
    tensors = {name: t.clone() for name, t in load_file(other).items()}
    save_file(tensors | {DOWN: torch.ones(64, 96)}, other)
    assert f"tensor {DOWN} is in the checkpoint twice" in refusal(model)


def test_index_outside_the_directory(model: Path) -> None:
    weight_map = shard(model)
    (model / "b.safetensors").rename(model.parent / "b.safetensors")
    outside = {name: f.replace("b.", "../b.") for name, f in weight_map.items()}
    write_index(model, outside)
    assert "names ../b.safetensors, which is not a file in" in refusal(model)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON ("),
        ("[]", "a JSON object is expected"),
        ("{}", "its weight_map names no file for each tensor"),
        ('{"weight_map": 3}', "its weight_map names no file for each tensor"),
        ('{"weight_map": {"a": 1}}', "its weight_map names no file for each tensor"),
    ],
)
def test_broken_index(model: Path, text: str, problem: str) -> None:
    index = model / "model.safetensors.index.json"
    index.write_text(text)
    assert refusal(model).startswith(f"{index}: {problem}")


def test_tied_and_present(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path, tie_word_embeddings=True)
    tokens = some_tokens(9)
    without = all_logits(load(model), tokens)
    rewrite(model, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    torch.testing.assert_close(all_logits(load(model), tokens), without, rtol=0, atol=0)
    rewrite(model, lambda t: t["lm_head.weight"].add_(1.0))
    assert refusal(model) == (
        f"{model / 'model.safetensors'}: tensor lm_head.weight differs from the embedding, "
        "but the config says tie_word_embeddings=true"
    )


def test_tied_and_misshaped(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path, tie_word_embeddings=True)
    rewrite(model, lambda t: t.update({"lm_head.weight": torch.ones(3, 64)}))
    assert "tensor lm_head.weight has shape [3, 64], the config asks for [384, 64]" in refusal(
        model
    )


def test_fused_tensor_misshaped(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path, "ChatGLMModel")
    name = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    rewrite(model, lambda t: t.update({name: torch.ones(64, 64)}))
    assert f"tensor {name} has shape [64, 64], the config asks for [128, 64]" in refusal(model)


def test_dummy_weights_are_random_and_always_the_same(model: Path) -> None:
    (model / "model.safetensors").unlink()
    arch = read_arch(model)
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "max_model_len": 64}
    decoders = [Decoder(arch, **options) for _ in range(2)]
    for decoder in decoders:
        fill_randomly(decoder)
    first, second = (decoder.weights() for decoder in decoders)
    assert first.keys() == arch.weights().keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        assert weight.isfinite().all() and weight.std() > 0.01
