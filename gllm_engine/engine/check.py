"""Tells whether a model would start, and with what memory, without a GPU and without its weights.

Refuses whatever a start refuses, by the same functions and with the same sentences. Of the
checkpoint it reads config.json, the tokenizer's files and the headers of the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec
import torch

from gllm_engine.arch import Model, cache_groups
from gllm_engine.config import ConfigError, EngineConfig, settle
from gllm_engine.engine.core import check_len, model_len, read_model
from gllm_engine.model import KernelUse, open_checkpoint
from gllm_engine.sched import Group, PagePool, capacity, make_groups
from gllm_engine.text.tokenizer import Tokenizer
from gllm_engine.workers.build_runner import (
    check_formats,
    check_shards,
    held_formats,
    memory_of_gpu,
)
from gllm_engine.workers.estimate import estimate


class StageReport(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of memory of each of the `ranks` ranks of a pipeline stage.

    `weights`: by kind. `tables`: of rotary angles. `driver`, `encoders` (what they have on the
    rank's GPU), `step` (activations, sampling, workspaces and CUDA graphs): estimates. `states`: of
    recurrent layers, for sequences, and `snapshots` of them for prefix hits. `free`: what is left
    of a GPU; None on a CPU.
    """

    first_layer: int
    last_layer: int
    ranks: int
    weights: dict[str, int]
    tables: int
    driver: int
    encoders: int
    step: int
    states: int
    snapshots: int
    kv_cache: int
    free: int | None


class EncoderReport(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of memory of each of the `encoders` encoders, as of StageReport. `step`: for the
    largest image.
    """

    encoders: int
    weights: int
    driver: int
    step: int
    free: int | None


class GroupReport(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that share a page table. `pages`: of a sequence of `max_model_len` tokens."""

    layers: int
    window: int | None
    pages: int


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a start would take. `gpu_memory`: bytes of each GPU; None: the model runs on a CPU.

    The groups share `num_pages` pages of `page_size` tokens, which hold `cached_tokens` tokens if
    one group has them all, or `sequences` sequences of `max_model_len` tokens. `cut_is_estimated`:
    a start measures which layers each stage gets, so it may choose others. `encoder`: None if the
    ranks encode images.
    """

    model: str
    num_params: int
    gpu_memory: int | None
    dtype: str
    kv_cache_dtype: str
    stages: list[StageReport]
    encoder: EncoderReport | None
    cut_is_estimated: bool
    num_pages: int
    page_size: int
    cached_tokens: int
    max_model_len: int
    sequences: int
    num_snapshots: int
    groups: list[GroupReport]
    kernels: list[KernelUse]


def check_model(config: EngineConfig, gpu_memory: int | None = None) -> CheckReport:
    """Check the model in `config.model`. `gpu_memory`: bytes of each GPU; default: this machine's.

    Raises ConfigError, ArchError, LoadError or TextError, as a start does.
    """
    gpu_memory = _gpu_memory(config, gpu_memory)
    path = Path(config.model)
    arch = read_model(config)
    config = settle(config, gpu_memory, arch.state_bytes)
    check_len(config, arch)
    check_shards(config, arch)
    if config.load_format == "dummy":  # only config.json has to be there
        return _report(config, arch.quantized(), gpu_memory)
    Tokenizer(config.tokenizer or path)
    with open_checkpoint(arch, path) as checkpoint:
        return _report(config, checkpoint.arch, gpu_memory)


def _gpu_memory(config: EngineConfig, given: int | None) -> int | None:
    """Bytes of the GPUs to check for; None: the model runs on a CPU."""
    if config.device == "none":
        raise ConfigError("device: none runs no model, so there is nothing to check")
    if given is not None:
        if config.device == "cpu":
            raise ConfigError("device: it is cpu, so the memory of a GPU does not matter")
        return given
    return memory_of_gpu(config)


def _report(config: EngineConfig, arch: Model, gpu_memory: int | None) -> CheckReport:
    arch = held_formats(arch, config.quantization)
    if gpu_memory is not None:
        # Of the first Hopper, if there is no GPU here: which one is meant is not known.
        here = torch.cuda.is_available()
        check_formats(arch, torch.cuda.get_device_capability() if here else (9, 0))
    found = estimate(config, arch, gpu_memory)
    kinds = cache_groups(arch, config.max_model_len or arch.max_len)
    groups = make_groups(kinds, config, found.num_pages)
    max_model_len = model_len(config, arch, capacity(groups, arch.max_len))
    longest = -(-max_model_len // config.page_size)  # pages of a sequence without windows
    reports = [
        GroupReport(
            layers=len(kind.layers), window=kind.window, pages=min(longest, group.most_pages)
        )
        for kind, group in zip(kinds, groups, strict=True)
    ]
    stages = [
        StageReport(
            **asdict(stage),
            ranks=config.tensor_parallel_size,
            free=None if gpu_memory is None else gpu_memory - stage.total,
        )
        for stage in found.stages
    ]
    encoder = None
    if found.encoder is not None:
        encoder = EncoderReport(
            **asdict(found.encoder),
            encoders=config.encoder_workers,
            free=None if gpu_memory is None else gpu_memory - found.encoder.total,
        )
    return CheckReport(
        model=config.model,
        num_params=arch.num_params(),
        gpu_memory=gpu_memory,
        dtype=_name(found.dtype),
        kv_cache_dtype=_name(found.cache_dtype),
        stages=stages,
        encoder=encoder,
        cut_is_estimated=config.pipeline_parallel_size > 1 and config.assigned_layers is None,
        num_pages=found.num_pages,
        page_size=config.page_size,
        cached_tokens=found.num_pages * config.page_size,
        max_model_len=max_model_len,
        sequences=_sequences(groups, reports),
        num_snapshots=found.num_snapshots,
        groups=reports,
        kernels=found.kernels,
    )


def _sequences(groups: Sequence[Group], reports: Sequence[GroupReport]) -> int:
    """How many sequences of the greatest length the pools hold at once."""
    used = Counter[PagePool]()
    for group, report in zip(groups, reports, strict=True):
        used[group.pool] += report.pages
    return min(pool.num_pages // count for pool, count in used.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
