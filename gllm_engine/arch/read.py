"""Makes a Model from a checkpoint's config.json.

families/ has the readers; here are the checks that are the same for all of them.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from gllm_engine.arch.checkpoint_files import tensor_names
from gllm_engine.arch.families.common import ACTIVATIONS
from gllm_engine.arch.families.registry import FAMILIES, Family
from gllm_engine.arch.fields import ArchError, Fields, LoadError
from gllm_engine.arch.known_keys import unknown_keys
from gllm_engine.arch.model import Dense, Gqa, Mla, Model
from gllm_engine.arch.names import has_tower
from gllm_engine.arch.quantization import read_quantization
from gllm_engine.arch.vision import Vision
from gllm_engine.files import read_object, shown

# Larger than any known model. A config without limits could describe a model too large to build.
MAX_LEN = 2**24  # tokens
# Keys beside the description of the text model that are about it.
_VISION = "vision_config"
_QUANTIZATION = "quantization_config"
# Files in which older tools wrote it, and the quant_method if they do not tell it.
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_SHARED_KEYS = ("tie_word_embeddings", _QUANTIZATION)

log = logging.getLogger(__name__)


def read_arch(directory: str | Path) -> Model:
    """Read a checkpoint directory's config.json and the end-of-text ids of generation_config.json.

    A checkpoint that has none of the tensors of its vision tower is of a model of text alone.
    Raises ArchError for an unreadable file, invalid JSON, or an unsupported architecture or value.
    """
    path = Path(directory)
    config = read_object(path / "config.json", ArchError)
    for file, method in _BESIDE.items():
        if os.path.lexists(path / file) and not config.get(_QUANTIZATION):
            log.info("%s: read as the config's %s", path / file, _QUANTIZATION)
            config[_QUANTIZATION] = {"quant_method": method} | read_object(path / file, ArchError)
    model = make_arch(config, str(path / "config.json"))
    generation = path / "generation_config.json"
    if os.path.lexists(generation):  # a broken link is an error, not absence
        eos = Fields(read_object(generation, ArchError), str(generation), {}).numbers(
            "eos_token_id"
        )
        model = replace(model, eos_token_ids=eos or model.eos_token_ids)
    if model.vision is not None:
        model = replace(model, vision=_as_processed(model.vision, path))
        if not _may_have_tower(model, path):
            log.warning("%s: no file has a tensor of the vision tower, so it takes no images", path)
            unknown = (k for k in model.unknown_keys if not k.startswith(f"{_VISION}."))
            model = replace(model, vision=None, unknown_keys=tuple(unknown))
    return replace(model, eos_token_ids=tuple(i for i in model.eos_token_ids if i < model.vocab))


def _may_have_tower(model: Model, path: Path) -> bool:
    """Also if the files are not there, or wrong: loading them says so."""
    try:
        return has_tower(model, tensor_names(path))
    except LoadError:
        return True


def _as_processed(vision: Vision, path: Path) -> Vision:
    """With the mean and the deviation of pixels from the image processor's file, if there is one.

    Newer checkpoints have it inside of another file.
    """
    for file, key in (
        ("preprocessor_config.json", ""),
        ("processor_config.json", "image_processor"),
    ):
        if not os.path.lexists(path / file):
            continue
        fields = Fields(read_object(path / file, ArchError), str(path / file), {})
        fields = fields.child(key) if key else fields
        fields.require(do_rescale=True, do_normalize=True, rescale_factor=1 / 255)
        fields = fields.with_defaults(image_mean=[*vision.mean], image_std=[*vision.std])
        return replace(vision, mean=fields.reals("image_mean", 3), std=fields.reals("image_std", 3))
    return vision


def make_arch(config: dict[str, Any], name: str = "config.json") -> Model:
    """The Model that a config.json object describes. `name`: the prefix of error messages.

    Raises ArchError for an unsupported architecture or value.
    """
    architectures = config.get("architectures")
    known = [a for a in FAMILIES if isinstance(architectures, list) and a in architectures]
    if not known:
        raise ArchError(
            f"{name}: architectures is {shown(repr(architectures))}; "
            f"supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[known[0]].of(config)
    outer = Fields(config, name, {})
    fields = _text_fields(config, name, family)
    fields.require(dual_chunk_attention_config=None)
    for part in (outer, fields):
        part.require(is_causal=True, causal=True, normalize_attention_scores=True)
    model = replace(family.read(fields), quantization=read_quantization(fields))
    _check_keys(fields, model)
    _check_limits(model, name)
    unknown = [*unknown_keys(fields.unread())]
    if family.vision is not None and config.get(_VISION):
        tower = outer.child(_VISION)
        model = replace(model, vision=family.vision(tower, outer, model))
        _check_vision(model, name)
        unknown += (f"{_VISION}.{key}" for key in unknown_keys(tower.unread()))
    text_key = family.text_key or ""
    # Without a tower nobody reads what there is about it.
    if config.get(text_key) and (family.vision is None or model.vision is not None):
        # Of a key in both objects the text model's value counts.
        outer.ignore(text_key, *_SHARED_KEYS, *config[text_key])
        unknown += unknown_keys(outer.unread())
    return replace(model, unknown_keys=tuple(unknown))


def _text_fields(config: dict[str, Any], name: str, family: Family) -> Fields:
    """The keys of the text model."""
    key = family.text_key
    if key is None or family.may_be_flat and not config.get(key):
        return Fields(config, name, family.defaults)
    if not config.get(key):
        raise ArchError(f"{name}: {key} is missing, the text model's description")
    shared = {key: config[key] for key in _SHARED_KEYS if key in config}
    return Fields(config, name, {}).child(key, defaults=family.defaults, over=shared)


def _check_keys(fields: Fields, model: Model) -> None:
    """Raise ArchError for an activation or types of layers that the family does not have."""
    ffn = model.layers[0].ffn
    act = ffn.act if isinstance(ffn, Dense) else "silu"
    names = tuple(name for name, function in ACTIVATIONS.items() if function == act)
    fields.choice("hidden_act", names, names[0])
    if "layer_types" in fields.unread():  # the family does not read it
        mixers = {layer.mixer for layer in model.layers}
        sparse = any(isinstance(mixer, Mla) and mixer.indexer is not None for mixer in mixers)
        sparse_kinds = ("indexed_attention", "deepseek_sparse_attention")
        kinds = sparse_kinds if sparse else ("full_attention",)
        fields.choices("layer_types", len(model.layers), kinds)


def _check_vision(model: Model, name: str) -> None:
    """Raise ArchError for a vision tower that does not fit the text model."""
    vision = model.vision
    assert vision is not None
    blocks = range(vision.depth)
    if list(vision.deep) != sorted(set(vision.deep) & set(blocks)):
        raise ArchError(
            f"{name}: deepstack_visual_indexes is {[*vision.deep]}, but only ascending numbers of "
            f"the tower's {vision.depth} blocks are supported"
        )
    if vision.num_deep >= len(model.layers):  # after the last one nothing is added
        raise ArchError(
            f"{name}: deepstack_visual_indexes has {vision.num_deep} numbers, but only fewer than "
            f"the text model's {len(model.layers)} layers are supported"
        )
    if vision.image_token >= model.vocab:
        raise ArchError(
            f"{name}: the placeholder of images is token {vision.image_token}, but the text model "
            f"has vocab_size={model.vocab}"
        )


def _check_limits(model: Model, name: str) -> None:
    """Raise ArchError for a model that is too long, or whose heads share keys unevenly."""
    if model.max_len > MAX_LEN:
        raise ArchError(
            f"{name}: the model's length is {model.max_len} tokens with its RoPE scaling, but only "
            f"up to {MAX_LEN} is supported"
        )
    for mixer in {layer.mixer for layer in model.layers}:
        if isinstance(mixer, Gqa) and mixer.heads % mixer.kv_heads:
            raise ArchError(
                f"{name}: {mixer.heads} attention heads cannot share {mixer.kv_heads} "
                "key/value heads evenly"
            )
