"""Builds a runner from a configuration: chooses the device, the dtype and the rank's shard.

Knows nothing of requests, sockets or processes.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from gllm_engine.arch import Model, Shard, cache_groups
from gllm_engine.arch.formats import Fp8, Rounded, stored_kind
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.files import read_object
from gllm_engine.model import (
    Checkpoint,
    Decoder,
    LoneTower,
    VisionTower,
    best_device,
    fill_randomly,
    filling,
    open_checkpoint,
)
from gllm_engine.parallel import ALONE, RankGroups, TensorParallel
from gllm_engine.runner import RecordedRanks, Runner, StepTimers, measure_partition
from gllm_engine.timeline import OFF, NoRecorder

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_runner(
    config: EngineConfig,
    arch: Model,
    device: torch.device,
    ranks: RankGroups | None = None,
    recorder: NoRecorder = OFF,
) -> Runner:
    """Load the model in `config.model`, or this rank's shard of it; returns a runner.

    Without `ranks` the shard is rank 0's part of every layer. With tensor parallelism its results
    are meaningless, but its shapes are right. Raises ConfigError, ArchError or LoadError.
    """
    start = time.perf_counter()
    is_dummy = config.load_format == "dummy"
    with ExitStack() as opened:
        checkpoint = None
        if not is_dummy:
            # First: a checkpoint that does not fit its config then fails before any allocation.
            checkpoint = opened.enter_context(open_checkpoint(arch, Path(config.model)))
        arch = arch.quantized() if checkpoint is None else checkpoint.arch
        arch = held_formats(arch, config.quantization)
        if device.type == "cuda":
            check_formats(arch, torch.cuda.get_device_capability(device))
        dtype = weights_dtype(config, on_gpu=device.type == "cuda")
        timers = StepTimers(device, recorder)
        decoder = Decoder(
            arch,
            dtype=dtype,
            device=device,
            max_model_len=config.max_model_len or arch.max_len,
            shard=_shard(config, arch, ranks, dtype),
            ranks=ALONE if ranks is None else _recorded(ranks.tensor, timers),
            encodes=not config.encoder_workers,
        )
        if is_dummy:
            fill_randomly(decoder)
        made = time.perf_counter()
        shows = ranks is None or ranks.leads_node  # the ranks of a node read at the same pace
        # CUDA graphs and kernels need the addresses of the weights, but not yet their values.
        with nullcontext() if checkpoint is None else filling(decoder, checkpoint, shows):
            runner = Runner(config, arch, decoder, ranks, timers)
            done = time.perf_counter()
        if config.spare_layers:
            runner.fill = _Filler(checkpoint, opened.pop_all())
    end = time.perf_counter()
    parts = {"decoder": made - start, **runner.took, "rest of the weights": end - done}
    told = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
    log.info("the model is ready in %.1f s: %s", end - start, told)
    return runner


def load_tower(
    config: EngineConfig, arch: Model, dtype: torch.dtype, device: torch.device
) -> VisionTower:
    """The vision tower of the model in `config.model`, without the decoder.

    Raises LoadError for whatever is wrong with the checkpoint, also outside of the tower.
    """
    assert arch.vision is not None
    lone = LoneTower(arch, VisionTower(arch.vision, dtype, device), device)
    if config.load_format == "dummy":
        fill_randomly(lone)
        return lone.tower
    with open_checkpoint(arch, Path(config.model)) as checkpoint, filling(lone, checkpoint):
        return lone.tower


@dataclass(frozen=True)
class _Filler:
    """Loads layers that come later. `files`: the checkpoint's stay open, so that new ones in their
    place are not mixed with them.
    """

    checkpoint: Checkpoint | None
    files: ExitStack

    def __call__(self, decoder: Decoder) -> None:
        if self.checkpoint is None:
            fill_randomly(decoder)
            return
        with filling(decoder, self.checkpoint, shows=False):
            return


def _recorded(ranks: TensorParallel, timers: StepTimers) -> TensorParallel:
    """The same ranks; if steps are recorded, their collectives are too."""
    if ranks.size == 1 or not timers.recorder.is_on:
        return ranks
    return RecordedRanks(ranks.rank, ranks.size, ranks.device, ranks.group, ranks.same_node, timers)


def check_shards(config: EngineConfig, arch: Model) -> None:
    """Raise ConfigError or ArchError if the model cannot be split as configured."""
    if config.encoder_workers and arch.vision is None:
        raise ConfigError(
            f"encoder_workers: {config.encoder_workers} is for a model that takes images, and this "
            "one takes text alone"
        )
    num_layers = len(arch.layers)
    stages = config.pipeline_parallel_size
    cut = config.stage_layers()
    if num_layers < stages:
        raise ConfigError(
            f"pipeline_parallel_size: {stages} is more than the {num_layers} layers of the model"
        )
    if cut is not None and sum(cut) != num_layers:
        raise ConfigError(
            f"assigned_layers: {config.assigned_layers} is {sum(cut)} layers, the model has "
            f"{num_layers}"
        )
    starts = list(accumulate((len(run) for run in arch.runs()), initial=0))[:-1]
    if len(starts) < stages:
        raise ConfigError(
            f"pipeline_parallel_size: {stages} is more than the {len(starts)} stages into which "
            f"the model can be cut: {_where_to_cut(starts)}"
        )
    for first in accumulate(cut[:-1] if cut else ()):
        if first not in starts:
            raise ConfigError(
                f"assigned_layers: {config.assigned_layers} lets a stage begin with layer {first}: "
                f"{_where_to_cut(starts)}"
            )
    groups = cache_groups(arch, config.max_model_len or arch.max_len)
    if config.spare_layers and len(groups) > 1:
        raise ConfigError(
            f"spare_layers: {config.spare_layers} is more than 0, but layers of this model see "
            "different windows and share memory, so they cannot move"
        )
    size = config.tensor_parallel_size
    apart = config.enable_expert_parallel
    Shard(0, num_layers, size=size, experts_apart=apart).of(arch)


def check_encoder_gpus(config: EngineConfig, device: torch.device) -> None:
    """Raise ConfigError if this machine has too few GPUs. `device`: of a rank."""
    ranks = config.num_ranks // config.nnodes
    if device.type == "cuda" and ranks + config.encoder_workers > torch.cuda.device_count():
        raise ConfigError(
            f"encoder_workers: {config.encoder_workers} encoders need a GPU each beside the "
            f"{ranks} of this machine's ranks, and torch finds {torch.cuda.device_count()}"
        )


def _where_to_cut(starts: list[int]) -> str:
    return (
        "layers that attend to the tokens that an earlier layer has chosen must be in its stage, "
        "and layers that add embeddings of images in the first, "
        f"so a stage can only begin with layer {', '.join(map(str, starts))}"
    )


def _shard(
    config: EngineConfig, arch: Model, ranks: RankGroups | None, dtype: torch.dtype
) -> Shard:
    """This rank's shard of the model; without `ranks`, rank 0's part of every layer."""
    whole = (len(arch.layers),)
    if ranks is None:
        return shard_of(config, whole, stage=0)
    cut = config.stage_layers() or (whole if ranks.mesh.pp == 1 else None)
    cut = cut or measure_partition(config, arch, ranks, dtype)
    shard = shard_of(config, cut, ranks.stage, ranks.tensor.rank)
    log.info("rank %d: layers %d to %d of %s", ranks.rank, shard.first, shard.end - 1, cut)
    return shard


def shard_of(config: EngineConfig, cut: tuple[int, ...], stage: int, rank: int = 0) -> Shard:
    """The shard of a rank of a stage. `cut`: the number of layers of each stage."""
    first, end = list(accumulate(cut, initial=0))[stage : stage + 2]
    size = config.tensor_parallel_size
    return Shard(first, end, rank, size, experts_apart=config.enable_expert_parallel)


def device_of(config: EngineConfig, index: int = 0) -> torch.device:
    """The device to run on; `index`: which GPU of the node. Raises ConfigError without a GPU."""
    kind = best_device().type if config.device == "auto" else config.device
    if kind != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device: it is cuda, but torch finds no GPU here")
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device: GPU {index} of this machine is asked for, counted from 0, and torch finds "
            f"{torch.cuda.device_count()}"
        )
    return torch.device("cuda", index)


def memory_of_gpu(config: EngineConfig) -> int | None:
    """Bytes of a GPU that the model runs on; None: it runs on a CPU. Raises as device_of does."""
    device = device_of(config)
    if device.type == "cpu":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def held_formats(arch: Model, quantization: str) -> Model:
    """The model with the formats in which its weights are held, for the key `quantization`.

    `arch`: with the formats of the checkpoint. Raises ConfigError if they exclude each other.
    """
    if quantization == "none":
        return arch.widened()
    if quantization == "auto":
        return arch
    for kind in sorted(arch.formats(), key=str):
        if not isinstance(stored_kind(kind), Fp8):
            raise ConfigError(f"quantization: it is fp8, but weights of the checkpoint are {kind}")
    return arch if arch.formats() else arch.rounded()


def check_formats(arch: Model, capability: tuple[int, int]) -> None:
    """Raise ConfigError if a GPU cannot compute with a format of the model's weights."""
    for kind in sorted(arch.formats(), key=str):
        if isinstance(kind, (Fp8, Rounded)) and capability < (8, 9):
            raise ConfigError(
                f"quantization: the weights are {kind}, which needs a GPU of compute capability "
                f"8.9 or later; this one has {'.'.join(map(str, capability))}. With quantization: "
                "none they are plain numbers in its memory"
            )
        if isinstance(kind, Fp8) and kind.columns % 16:
            raise ConfigError(
                f"model: its weights are {kind}, but a GPU needs blocks with a multiple of 16 "
                "columns"
            )


def weights_dtype(config: EngineConfig, on_gpu: bool) -> torch.dtype:
    """The dtype of plain weights and of activations."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    if not on_gpu:
        return torch.float32
    settings = read_object(Path(config.model) / "config.json", ConfigError)
    text = settings.get("text_config")  # where a model for images and text may have it
    places = [settings, text if isinstance(text, dict) else {}]
    names = [place.get(key) for place in places for key in ("dtype", "torch_dtype")]
    stored = next((name for name in names if name), None)
    return _DTYPES.get(str(stored), torch.bfloat16)
