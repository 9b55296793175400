"""The memory of every rank, without a device and without weights.

Builds each stage's decoder on torch's meta device, where tensors have shapes and no memory, and
sizes the KV cache by the functions that a start uses.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gllm_engine.arch import Model
from gllm_engine.arch.model import HEAD
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.model import Decoder, KernelUse, VisionTower, kernels_of
from gllm_engine.parallel import TensorParallel, partition_layers
from gllm_engine.runner import GpuMemory, PeakMemory, encode_blank, kv_sizing
from gllm_engine.workers.build_runner import shard_of, weights_dtype

# The CUDA context, libraries and communicators of a rank. An estimate: it varies with the driver.
_DRIVER_BYTES = 1 << 30
# Part of a weight's name -> kind of the weight. The first one that fits counts.
_KINDS = (
    (r"^visual\.", "vision tower"),
    (r"\.mlp\.experts\.", "experts"),
    (r"\.mlp\.(gate\.|shared_expert_gate)", "routers"),
    (r"\.mlp\.", "feed-forward"),
    (r"norm\.(weight|bias)$", "norms"),
    (r"^model\.layers\.", "attention"),
    (r"^model\.embed", "embeddings"),
    (r"^lm_head\.", "output projection"),
)
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


class _Shapes(TensorParallel):
    """The ranks of a stage, with the shapes of their results and no communication."""

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), self.size * x.shape[1])


@dataclass(frozen=True)
class StageMemory:
    """The memory of the first rank of a pipeline stage, in bytes; the other ranks take no more.

    `weights`: by kind. `tables`: of rotary angles. `states`: of all slots. `encoders`: what they
    have on the rank's GPU. `step`: for a step, workspaces and CUDA graphs. On a CPU, where memory
    is not limited, `driver`, `encoders` and `step` are 0.
    """

    first_layer: int
    last_layer: int
    weights: dict[str, int]
    tables: int
    driver: int
    encoders: int
    step: int
    states: int
    snapshots: int
    kv_cache: int

    @property
    def total(self) -> int:
        given = self.driver + self.encoders + self.step
        kept = self.tables + self.states + self.snapshots + self.kv_cache
        return sum(self.weights.values()) + given + kept


@dataclass(frozen=True)
class EncoderMemory:
    """The memory of an encoder, in bytes. `weights`: of the vision tower. `step`: for the largest
    image; 0 on a CPU, as `driver`.
    """

    weights: int
    driver: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.driver + self.step


@dataclass(frozen=True)
class Estimate:
    """What a start with a configuration would take. `num_pages`, `num_snapshots`: as of Runner.
    `encoder`: None if the ranks encode images.

    `kernels`: of every kind of device, whatever the one that the rest is for.
    """

    dtype: torch.dtype
    cache_dtype: torch.dtype
    num_pages: int
    num_snapshots: int
    stages: list[StageMemory]
    kernels: list[KernelUse]
    encoder: EncoderMemory | None


@dataclass(frozen=True)
class _Stage:
    """A stage's decoder; `made`: bytes of its tensors; `step`: see StageMemory."""

    decoder: Decoder
    made: int
    step: int


@torch.inference_mode()
def estimate(config: EngineConfig, arch: Model, gpu_memory: int | None) -> Estimate:
    """Size every rank. `gpu_memory`: bytes of each GPU; None: the ranks run on a CPU.

    `config`: settled. Raises ConfigError if there is no room for a KV cache.
    """
    dtype = weights_dtype(config, on_gpu=gpu_memory is not None)
    cut = config.stage_layers() or _cut(config, arch, dtype)
    num_stages = config.pipeline_parallel_size
    stages = [_stage(config, arch, dtype, cut, i, gpu_memory) for i in range(num_stages)]
    num_pages = min(_pages(config, stage, gpu_memory) for stage in stages)
    num_snapshots = kv_sizing.fitting_snapshots(config, stages[0].decoder, num_pages)
    sizes = [_memory(config, stage, num_pages, num_snapshots, gpu_memory) for stage in stages]
    for number, size in enumerate(sizes):
        if gpu_memory is not None and size.total > gpu_memory:
            raise ConfigError(_no_room(config, number, size, gpu_memory))
    cache_dtype = kv_sizing.cache_dtype(config, stages[0].decoder)
    layers = [layer for stage in stages for layer in stage.decoder.layers]
    on_gpu = weights_dtype(config, on_gpu=True)
    gpu_cache = on_gpu if cache_dtype == dtype else cache_dtype
    kernels = kernels_of(layers, on_gpu, gpu_cache, dict(arch.vocab_formats).get(HEAD))
    encoder = _encoder(config, arch, dtype, gpu_memory) if config.encoder_workers else None
    return Estimate(dtype, cache_dtype, num_pages, num_snapshots, sizes, kernels, encoder)


def _encoder(
    config: EngineConfig, arch: Model, dtype: torch.dtype, gpu_memory: int | None
) -> EncoderMemory:
    assert arch.vision is not None
    device = torch.device("meta")
    with PeakMemory() as memory:
        tower = VisionTower(arch.vision, dtype, device)
        weights = memory.now
        if gpu_memory is None:
            return EncoderMemory(weights, 0, 0)
        encode_blank(tower, config.largest_image, device)
    found = EncoderMemory(weights, _DRIVER_BYTES, memory.peak - weights)
    if found.total > gpu_memory:
        gib = 1 << 30
        raise ConfigError(
            f"encoder_workers: an encoder takes {found.total / gib:.1f} GiB, "
            f"{found.step / gib:.1f} of them for an image of {config.largest_image} tokens "
            f"(image_cache_tokens, encoder_budget); a GPU has {gpu_memory / gib:.1f}"
        )
    return found


def _no_room(config: EngineConfig, stage: int, size: StageMemory, gpu_memory: int) -> str:
    gib = 1 << 30
    key = "kv_cache_gib" if config.num_pages is None else "num_pages"
    return (
        f"{key}: a KV cache of {size.kv_cache / gib:.1f} GiB does not fit beside the "
        f"{(size.total - size.kv_cache) / gib:.1f} GiB that stage {stage} takes otherwise; a GPU "
        f"has {gpu_memory / gib:.1f}"
    )


def _decoder(
    config: EngineConfig, arch: Model, dtype: torch.dtype, cut: tuple[int, ...], stage: int
) -> Decoder:
    device = torch.device("meta")
    return Decoder(
        arch,
        dtype=dtype,
        device=device,
        max_model_len=config.max_model_len or arch.max_len,
        shard=shard_of(config, cut, stage),
        ranks=_Shapes(0, config.tensor_parallel_size, device, None, same_node=True),
        encodes=not config.encoder_workers,
    )


def _cut(config: EngineConfig, arch: Model, dtype: torch.dtype) -> tuple[int, ...]:
    """Layers of each stage, by the bytes of their weights: a start measures their times instead,
    and reading the weights takes most of the time of a decode step.
    """
    whole = (len(arch.layers),)
    if config.pipeline_parallel_size == 1:
        return whole
    runs = arch.runs()
    run_of = [number for number, run in enumerate(runs) for _ in run]  # of each layer
    costs = [0.0] * len(runs)
    head = 0
    for name, num_bytes in _decoder(config, arch, dtype, whole, 0).weight_bytes().items():
        if layer := _LAYER.match(name):
            costs[run_of[int(layer[1])]] += num_bytes
        elif not name.startswith("model.embed_positions"):
            head = max(head, num_bytes)  # the output projection, or the embedding
    return partition_layers(costs, head, config.pipeline_parallel_size, [len(run) for run in runs])


def _stage(
    config: EngineConfig,
    arch: Model,
    dtype: torch.dtype,
    cut: tuple[int, ...],
    stage: int,
    gpu_memory: int | None,
) -> _Stage:
    with PeakMemory() as memory:
        decoder = _decoder(config, arch, dtype, cut, stage)
        made = memory.now
    max_pages = -(-(config.max_model_len or arch.max_len) // config.page_size)
    on_gpu = gpu_memory is not None
    step = kv_sizing.step_bytes(config, decoder, max_pages).peak if on_gpu else 0
    return _Stage(decoder, made, step)


def _pages(config: EngineConfig, stage: _Stage, gpu_memory: int | None) -> int:
    if gpu_memory is None:
        return kv_sizing.fitting_pages(config, stage.decoder, None)
    used = stage.made + _DRIVER_BYTES + kv_sizing.encoder_bytes(config, stage.decoder)
    memory = partial(GpuMemory, gpu_memory, used, stage.step)
    return kv_sizing.fitting_pages(config, stage.decoder, memory)


def _memory(
    config: EngineConfig,
    stage: _Stage,
    num_pages: int,
    num_snapshots: int,
    gpu_memory: int | None,
) -> StageMemory:
    decoder = stage.decoder
    weights = Counter[str]()
    for name, num_bytes in decoder.weight_bytes().items():
        weights[_kind_of_weight(name)] += num_bytes
    on_gpu = gpu_memory is not None
    page_bytes = decoder.page_bytes(config.page_size, kv_sizing.cache_dtype(config, decoder))
    return StageMemory(
        first_layer=decoder.shard.first,
        last_layer=decoder.shard.end - 1,
        weights=dict(weights),
        tables=stage.made - sum(weights.values()),
        driver=_DRIVER_BYTES if on_gpu else 0,
        encoders=kv_sizing.encoder_bytes(config, decoder) if on_gpu else 0,
        step=stage.step,
        states=kv_sizing.states_bytes(config, decoder),
        snapshots=num_snapshots * decoder.state_bytes,
        kv_cache=num_pages * page_bytes,
    )


def _kind_of_weight(name: str) -> str:
    """The kind of a weight, by its canonical name."""
    return next(kind for pattern, kind in _KINDS if re.search(pattern, name))
