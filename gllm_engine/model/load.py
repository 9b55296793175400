"""From a safetensors checkpoint to a decoder: streaming, one tensor in memory at a time.

Everything that does not fit exactly is an error: missing, left over, twice, another shape, another
kind of number, a file cut short. Names come from spec/names.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gllm_engine.model.decoder import Decoder
from gllm_engine.spec.model import Model
from gllm_engine.spec.names import checkpoint_name, checkpoint_tensors, is_left_over

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = ("F64", "F32", "F16", "BF16")


class LoadError(ValueError):
    """The checkpoint does not fit its config; the message names the file and the tensor."""


def load_model(
    path: Path, spec: Model, *, dtype: torch.dtype, device: torch.device, max_model_len: int
) -> Decoder:
    """Build the decoder for `spec` and fill it from the checkpoint in `path`.

    Raises LoadError with one sentence that names the file and the tensor.
    """
    decoder = Decoder(spec, dtype=dtype, device=device, max_model_len=max_model_len)
    loader = _Loader(spec, decoder.weights())
    for file in _files(path):
        for name, stored in _tensors(file):
            loader.take(file, name, stored)
    loader.finish(path)
    return decoder


def make_dummy(
    path: Path, spec: Model, *, dtype: torch.dtype, device: torch.device, max_model_len: int
) -> Decoder:
    """Build the decoder for `spec` with random weights, always the same; `path` is not read.

    They are of a trained model's size, so that numbers stay in range, and none is constant:
    kernels run faster on zeros.
    """
    del path
    decoder = Decoder(spec, dtype=dtype, device=device, max_model_len=max_model_len)
    generator = torch.Generator(device).manual_seed(0)
    for name, view in decoder.weights().items():
        if name.endswith("norm.weight"):
            view.uniform_(0.5, 1.5, generator=generator)
        else:
            view.normal_(0, 0.02, generator=generator)
    return decoder


class _Loader:
    """Checks each checkpoint tensor and copies it to where its weights live."""

    def __init__(self, spec: Model, weights: dict[str, Tensor]) -> None:
        self._shapes, self._weights = spec.weights(), weights
        self._missing = checkpoint_tensors(spec)
        self._seen: set[str] = set()
        # A tied model's checkpoint may carry its output projection too, if it is the embedding.
        self._tied = checkpoint_name(spec, "lm_head.weight") if spec.tie else None
        self._tied_copy: tuple[Path, Tensor] | None = None

    def take(self, file: Path, name: str, stored: Any) -> None:
        """`stored`: a safetensors slice; its numbers are read only once it is known to fit."""
        if is_left_over(name):
            return
        if name in self._seen:
            raise LoadError(f"{file}: tensor {name} is in the checkpoint twice")
        self._seen.add(name)
        if name == self._tied:
            _check(file, name, stored, self._shapes["model.embed_tokens.weight"])
            self._tied_copy = file, stored[:]
            return
        if name not in self._missing:
            raise LoadError(f"{file}: tensor {name} is left over; the model has no place for it")
        parts = self._missing.pop(name)
        shapes = [self._shapes[part] for part in parts]
        rows = [shape[0] for shape in shapes]
        _check(file, name, stored, (sum(rows), *shapes[0][1:]))
        for part, numbers in zip(parts, stored[:].split(rows), strict=True):
            self._weights[part].copy_(numbers)

    def finish(self, path: Path) -> None:
        if self._missing:
            name = next(iter(self._missing))
            more = f" (and {len(self._missing) - 1} more)" if len(self._missing) > 1 else ""
            raise LoadError(f"{path}: tensor {name} is missing{more}")
        if self._tied_copy is not None:
            file, copy = self._tied_copy
            embedding = self._weights["model.embed_tokens.weight"]
            if not torch.equal(copy.to(embedding), embedding):
                raise LoadError(
                    f"{file}: tensor {self._tied} differs from the embedding, but the config says "
                    "tie_word_embeddings=true"
                )


def _check(file: Path, name: str, stored: Any, shape: tuple[int, ...]) -> None:
    found = tuple(stored.get_shape())
    if found != shape:
        raise LoadError(
            f"{file}: tensor {name} has shape {list(found)}, the config asks for {list(shape)}"
        )
    if stored.get_dtype() not in _DTYPES:
        raise LoadError(
            f"{file}: tensor {name} has dtype {stored.get_dtype()}; supported: {', '.join(_DTYPES)}"
        )


def _tensors(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield name, opened.get_slice(name)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{file}: not a complete safetensors file ({error})") from None


def _files(path: Path) -> list[Path]:
    """The checkpoint's files, each once, in the order of the index."""
    index = path / _INDEX
    if not index.exists():
        if not (path / _SINGLE).exists():
            raise LoadError(f"{path}: neither {_SINGLE} nor {_INDEX} is there")
        return [path / _SINGLE]
    try:
        files = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        paths = [path / name for name in files]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index}: not a safetensors index ({error!r})") from None
    for file in paths:
        if file.parent != path or not file.exists():
            raise LoadError(f"{index}: names {file.name}, which is not a file in {path}")
    return paths
