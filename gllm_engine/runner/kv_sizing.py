"""Chooses the number of pages of the KV cache.

On a GPU it runs the largest step that the configuration allows, and leaves that step's peak memory
free. On torch's meta device the same step tells the memory without a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gllm_engine.arch import MAX_EOS_TOKEN_IDS
from gllm_engine.arch.model import LatentShape
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.model import Decoder, LayerCache, VisionTower, bytes_of_states
from gllm_engine.ops import ImageRows
from gllm_engine.ops.batch import Batch, made_up_step
from gllm_engine.runner.peak_memory import PeakMemory
from gllm_engine.runner.sampler import SamplingBatch, log_probabilities, sample, scored_at_once
from gllm_engine.runner.sampling_state import SamplingState
from gllm_engine.runner.slot_table import SlotTable
from gllm_engine.runner.step_pieces import StepPieces, most_tokens
from gllm_engine.sampling import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from gllm_engine.types import NewSequence

# Memory that the trial step does not use and that does not grow with the number of sequences: the
# CUDA graphs themselves, and kernels that are loaded later.
_RESERVE_BYTES = 2 << 30
# A process that writes memory of another process's GPU has a CUDA context there. An estimate: it
# varies with the driver.
_CONTEXT_BYTES = 1 << 29
_GIB = 1 << 30

# The KV cache has this many times the memory of the snapshots of states.
_SNAPSHOT_SHARE = 8

_log = logging.getLogger(__name__)


def fitting_snapshots(config: EngineConfig, decoder: Decoder, num_pages: int) -> int:
    """Snapshots of states: config.num_snapshots, or as many as fit a share of the KV cache's
    memory. The same on all ranks with the same `num_pages`; 0 for a model without states.
    """
    if config.num_snapshots is not None and decoder.arch.keeps_states:
        return config.num_snapshots
    return int(num_pages * _snapshots_per_page(config, decoder))


def _snapshots_per_page(config: EngineConfig, decoder: Decoder) -> float:
    """The ratio is that of the whole model, because a rank may have no K and V, or no states."""
    whole = decoder.layers_of_all_stages()
    itemsize = cache_dtype(config, decoder).itemsize
    page_bytes = replace(decoder.arch, layers=whole).kv_bytes_per_token(itemsize) * config.page_size
    state_bytes = bytes_of_states(whole, decoder.dtype)
    return page_bytes / state_bytes / _SNAPSHOT_SHARE if state_bytes else 0.0


@dataclass(frozen=True)
class GpuMemory:
    """Memory of a GPU in bytes: all of it, what is in use before there is a KV cache or will be by
    encoders, and what is to be left free for a step. The memory that the first step takes and keeps
    is in one of the two.
    """

    total: int
    used: int
    step: int


def fitting_pages(
    config: EngineConfig, decoder: Decoder, memory: Callable[[], GpuMemory] | None
) -> int:
    """Pages for the KV cache: config.num_pages, or as many as the device has room for.

    `memory`: of the GPU, called if it limits the cache; None on a CPU. Raises ConfigError if a GPU
    has no room for one page.
    """
    if config.num_pages is not None:
        return config.num_pages
    # SlotTable.cached_tokens
    whole = next(group for group in decoder.groups if group.window is None)
    id_bytes = whole.num_pages(1) * config.page_size * torch.int64.itemsize
    page_bytes = decoder.page_bytes(config.page_size, cache_dtype(config, decoder))
    if config.kv_cache_gib is not None or memory is None:
        size = int((config.kv_cache_gib or 1.0) * 2**30)
        return max(1, size // (page_bytes or id_bytes))
    return _pages_in(config, decoder, memory(), page_bytes + id_bytes)


def _pages_in(config: EngineConfig, decoder: Decoder, memory: GpuMemory, page_bytes: int) -> int:
    """`page_bytes`: of a page in the KV cache and beside it."""
    spare = config.spare_layers
    copies = 2 if spare else 1  # a move of layers copies all states
    states = copies * states_bytes(config, decoder)
    if spare:
        # One more, for what is in memory for a while as a layer is loaded.
        states += (spare + 1) * decoder.largest_layer_bytes
        page_bytes += spare * _largest_page_bytes(config, decoder)
    usable = int(memory.total * config.gpu_memory_utilization)
    free = usable - memory.used - memory.step - states
    _log.info(
        "GPU memory in GiB: %.1f in use, %.1f for a step, %.1f for states of sequences and spare "
        "layers, %.1f for the KV cache, of %.1f",
        memory.used / _GIB,
        memory.step / _GIB,
        states / _GIB,
        free / _GIB,
        memory.total / _GIB,
    )
    snapshot_bytes = copies * decoder.state_bytes
    if config.num_snapshots is None:
        page_bytes += int(_snapshots_per_page(config, decoder) * snapshot_bytes)
    else:
        free -= config.num_snapshots * snapshot_bytes
    if free < page_bytes:
        and_layers = f" and {spare} layers (spare_layers)" if spare else ""
        raise ConfigError(
            f"gpu_memory_utilization: {config.gpu_memory_utilization} of "
            f"{memory.total / _GIB:.1f} GiB leaves no room for a KV cache: "
            f"{memory.used / _GIB:.1f} are in use, a step takes {memory.step / _GIB:.1f}, and the "
            f"states of {config.max_num_seqs} sequences (max_num_seqs){and_layers} "
            f"{states / _GIB:.1f}"
        )
    return free // page_bytes


def _largest_page_bytes(config: EngineConfig, decoder: Decoder) -> int:
    """Bytes of a page in the largest layer."""
    layers = decoder.layers_of_all_stages()
    shapes = [layer.mixer.cache_shapes(config.page_size) for layer in layers]
    numbers = max(sum(map(prod, parts)) for parts in shapes)
    return numbers * cache_dtype(config, decoder).itemsize


def states_bytes(config: EngineConfig, decoder: Decoder) -> int:
    """Bytes of the states of all slots of a GPU, of which CUDA graphs have one more."""
    return (config.max_num_seqs + 1) * decoder.state_bytes


def measured_memory(config: EngineConfig, decoder: Decoder, max_pages: int) -> GpuMemory:
    """The memory of the decoder's GPU. `max_pages`: pages of a sequence of the greatest length."""
    total = torch.cuda.mem_get_info(decoder.device)[1]
    step = step_bytes(config, decoder, max_pages)
    torch.cuda.empty_cache()
    used = total - torch.cuda.mem_get_info(decoder.device)[0] + encoder_bytes(config, decoder)
    return GpuMemory(total, used, step.peak - step.kept)


def encoder_bytes(config: EngineConfig, decoder: Decoder) -> int:
    """Bytes that encoders take of the decoder's GPU when they open its landing, beside that."""
    has_landing = decoder.image_numbers and decoder.tower is None
    return config.encoder_workers * _CONTEXT_BYTES if has_landing else 0


class StepBytes(NamedTuple):
    """The most bytes that steps take, of which they keep `kept` from the first one on."""

    peak: int
    kept: int


def step_bytes(config: EngineConfig, decoder: Decoder, max_pages: int) -> StepBytes:
    """Bytes for steps of any kind, on a GPU or on the meta device.

    `max_pages`: pages of a sequence of the greatest length.
    """
    reserved = _RESERVE_BYTES + _decode_bytes(config, decoder) + image_bytes(config, decoder)
    trial = _trial(config, decoder, max_pages)
    return trial._replace(peak=reserved + trial.peak)


def _decode_bytes(config: EngineConfig, decoder: Decoder) -> int:
    """Bytes that a decode step of all sequences needs and the trial step does not: this rank's
    logits of the CUDA graphs, and the float32 partials of split-KV attention.
    """
    widest = max(layer.mixer.attended_width for layer in decoder.layers)
    logits = decoder.shard.vocab_width(decoder.arch.vocab) if decoder.is_last else 0
    return config.max_num_seqs * (logits * decoder.dtype.itemsize + 4 * widest)


def image_bytes(config: EngineConfig, decoder: Decoder) -> int:
    """The most bytes of the embeddings of images: those that are kept, and the landing."""
    tokens = config.image_cache_tokens
    if decoder.tower is None:
        tokens += config.landing_tokens
    return tokens * decoder.image_numbers * decoder.dtype.itemsize


def cache_dtype(config: EngineConfig, decoder: Decoder) -> torch.dtype:
    """The dtype of the KV cache. Raises ConfigError if the GPU does not support it."""
    if config.kv_cache_dtype != "fp8":
        return decoder.dtype
    if decoder.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(decoder.device)
        if (major, minor) < (8, 9):
            raise ConfigError(
                "kv_cache_dtype: fp8 needs a GPU of compute capability 8.9 or later; this one has "
                f"{major}.{minor}"
            )
    return torch.float8_e4m3fn


class _Watch:
    """`peak`: the most bytes that were allocated at once, beyond those at the start; `kept`: those
    that still are.
    """

    peak = 0
    kept = 0


@contextmanager
def _watching(device: torch.device) -> Iterator[_Watch]:
    """Watch the memory of a GPU, or of torch's meta device, while the block runs."""
    watch = _Watch()
    if device.type == "meta":
        with PeakMemory() as memory:
            yield watch
        watch.peak = memory.peak
        watch.kept = memory.now
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield watch
    torch.cuda.synchronize(device)
    watch.peak = torch.cuda.max_memory_allocated(device) - before
    watch.kept = torch.cuda.memory_allocated(device) - before


def _trial(config: EngineConfig, decoder: Decoder, max_pages: int) -> StepBytes:
    """The bytes of the largest step and of the runner's state of all slots, beyond the memory
    allocated now. `max_pages`: pages of one sequence.
    """
    num_tokens = config.max_num_batched_tokens
    page_size = config.page_size
    longest = min(num_tokens, max_pages * page_size)
    lens = [longest] * (num_tokens // longest)
    lens += [num_tokens - sum(lens)] if num_tokens % longest else []
    # All rows write to the same pages: the contents do not matter here.
    num_pages = -(-longest // page_size)
    states = decoder.new_states(len(lens))
    cache = decoder.new_cache(num_pages, page_size, cache_dtype(config, decoder), states)
    in_pieces = piece_bytes(config, decoder, cache)
    with _watching(decoder.device) as watch:
        for length, count in _rows_of_each_kind(decoder, max_pages * page_size):
            _one_row(decoder, cache, length, count, page_size)
        if decoder.tower is not None:
            most = min(config.largest_image, max_pages * page_size)
            encode_blank(decoder.tower, most, decoder.device)
        _largest_step(config, decoder, cache, lens, max_pages)
    return StepBytes(in_pieces + watch.peak, watch.kept)


def piece_bytes(config: EngineConfig, decoder: Decoder, cache: list[LayerCache]) -> int:
    """Bytes of the graphs of steps with chunks, whose memory no other step uses."""
    max_tokens = most_tokens(config, decoder)
    if not max_tokens:
        return 0
    with _watching(decoder.device) as watch:
        pieces = StepPieces(decoder, cache, max_tokens, spare=0)
        pieces.compute(max_tokens)
    return watch.peak + pieces.graph_bytes


def _rows_of_each_kind(decoder: Decoder, max_len: int) -> Iterator[tuple[int, int]]:
    """(context length, tokens) of rows that an indexer chooses tokens for, and of some that it does
    not: both keep memory, and the largest step may be of one kind alone.
    """
    for shape in {layer.mixer.attention for layer in decoder.layers}:
        if isinstance(shape, LatentShape) and shape.top_k is not None:
            if shape.top_k < max_len:
                yield shape.top_k + 1, 1
            yield min(2, max_len), min(2, max_len)


def _one_row(
    decoder: Decoder, cache: list[LayerCache], length: int, count: int, page_size: int
) -> None:
    """A step with `count` tokens and a context of `length` tokens, all in one page."""
    pages = torch.zeros(1, -(-length // page_size), dtype=torch.int64, device=decoder.device)
    num_groups = len(decoder.groups)
    batch = made_up_step([(length, count)], pages, page_size, num_groups=num_groups)
    _forward(decoder, batch, cache)


def encode_blank(tower: VisionTower, num_tokens: int, device: torch.device) -> None:
    """Encode an image that takes almost so many tokens."""
    side = tower.vision.patch * tower.vision.merge
    rows = max(1, isqrt(num_tokens))
    shape = (rows * side, max(1, num_tokens // rows) * side, 3)
    tower.encode([torch.zeros(shape, dtype=torch.uint8, device=device)])


def _forward(decoder: Decoder, batch: Batch, cache: list[LayerCache]) -> Tensor:
    x: Tensor | None = None
    if not decoder.is_first:
        size = (len(batch.tokens), decoder.arch.dim)
        x = torch.zeros(size, dtype=decoder.dtype, device=decoder.device)
    return decoder.forward(batch, cache, x)


def _largest_step(
    config: EngineConfig,
    decoder: Decoder,
    cache: list[LayerCache],
    lens: list[int],
    max_pages: int,
) -> None:
    """A step with prompts of `lens` tokens, and the most expensive sampling of all sequences."""
    num_tokens = sum(lens)
    page_size = config.page_size
    device = decoder.device
    rows = min(config.max_num_seqs, num_tokens)
    table = SlotTable(rows, max_pages, 1, page_size, device, decoder.groups)
    state = SamplingState(table, decoder.arch.vocab)  # alive to the end, as in a runner
    sampling = costly_sampling(table, state)
    pages = torch.arange(-(-max(lens) // page_size), device=device)[None]
    scored = min(num_tokens, scored_at_once(decoder.arch.vocab))  # positions of prompts
    wanted = torch.arange(max(rows, scored), device=device)
    batch = made_up_step(
        [(n, n) for n in lens], pages, page_size, wanted, num_groups=len(decoder.groups)
    )
    if decoder.image_numbers:
        dim = decoder.arch.dim
        size = (decoder.image_numbers // dim, num_tokens, dim)
        embeddings = torch.zeros(size, dtype=decoder.dtype, device=device)
        batch = replace(
            batch,
            images=ImageRows(torch.arange(num_tokens, device=device), embeddings),
            rotary_positions=batch.positions.expand(3, -1) if decoder.arch.has_sections else None,
        )
        del embeddings
    hidden = _forward(decoder, batch, cache)
    del batch
    if decoder.is_last:
        scores = decoder.scores(hidden[:rows])
        raw = decoder.whole(scores).float()  # for log probabilities: outlives sampling
        tokens = sample(decoder.whole(scores).float(), sampling)
        log_probabilities(raw, tokens, MAX_LOGPROBS)
        del scores, raw
        targets = torch.zeros(scored, dtype=torch.int64, device=device)
        log_probabilities(decoder.logits(hidden[:scored]), targets, MAX_LOGPROBS)


def costly_sampling(table: SlotTable, state: SamplingState) -> SamplingBatch:
    """The most expensive sampling, one row per slot: it sorts the whole vocabulary, applies
    penalties and masks for sequences of the greatest length, and adds the longest lists of
    logit_bias and of tokens that min_tokens forbids.
    """
    _, num_slots, max_pages = table.page_table.shape
    length = max_pages * table.page_size
    table.lengths.fill_(length)
    table.lengths_cpu.fill(length)
    ids = range(state.vocab)
    eos = tuple(ids[MAX_STOP_TOKEN_IDS:][: MAX_EOS_TOKEN_IDS + 1])
    # Slot 0 draws at random, the others are greedy. Its lists are the longest; all rows of a step
    # are as wide as the longest list.
    each = [
        SamplingParams(
            temperature=float(not slot),
            top_p=0.9,
            min_p=0.1,
            logit_bias=dict.fromkeys(ids[: 1 if slot else MAX_LOGIT_BIAS], 1.0),
            stop_token_ids=tuple(ids[: 1 if slot else MAX_STOP_TOKEN_IDS]),
            min_tokens=length,
            max_tokens=length,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            repetition_penalty=1.5,
        )
        for slot in range(num_slots)
    ]
    new = [NewSequence(slot, 0, length // 2, params, eos) for slot, params in enumerate(each)]
    state.set_owners(new)
    masks = dict.fromkeys(range(num_slots), b"\xff" * -(-state.vocab // 8))
    slots = torch.arange(num_slots, device=table.device)
    return state.batch(np.arange(num_slots), slots, masks)
