"""The engine's configuration: one frozen object, validated once and never changed.

A field's name is the CLI flag and the key in model.json. This module does not know how values are
used.
"""

from __future__ import annotations

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import msgspec

from gllm_engine.files import read_object, shown
from gllm_engine.sampling import MAX_TENANT_CHARS

MAX_TENANT_WEIGHTS = 1024
# Keys of paths beside `model`; a relative one starts at the same directory.
PATH_KEYS = ("tokenizer", "cluster_key_file", "timeline", "allowed_media_directory")
OTHER_TENANTS = "other"  # in metrics: all tenants that tenant_weights does not name


class ConfigError(ValueError):
    """An invalid configuration. The message gives the key, its value and the allowed values."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to run one model. Keys that vLLM also has carry vLLM's name and meaning."""

    model: str  # model directory; a relative path starts at the directory of model.json
    tokenizer: str | None = None  # tokenizer directory; default: the model's directory
    # none: no model runs and tokens are made up, to measure the cost of everything else
    device: Literal["auto", "cpu", "cuda", "none"] = "auto"
    null_tokens_per_s: float | None = None  # most tokens that device none makes up in a second
    # type of weights and activations; auto: float32 on CPUs, the checkpoint's type on GPUs
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # format of the weights in memory; auto: as in the checkpoint; fp8: a plain checkpoint's weights
    # are rounded to float8_e4m3fn, with a scale per row; none: all weights are plain, of type dtype
    quantization: Literal["auto", "fp8", "none"] = "auto"
    # fp8: K and V are rounded to float8_e4m3fn, one byte a number, and on Hopper queries of prompts
    # too; auto: same type as dtype
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    # dummy: random weights for benchmarks; of the checkpoint only config.json is read
    load_format: Literal["auto", "dummy"] = "auto"
    # keys of the checkpoint's config.json that have no effect; without them here, a key that nobody
    # knows is refused, as it may change the model's arithmetic
    ignored_config_keys: tuple[str, ...] = ()
    enforce_eager: bool = False  # run without CUDA graphs
    max_model_len: int | None = None  # prompt plus output tokens; default: the checkpoint's limit
    # sequences in one step; default: 256, on GPUs 1024; fewer with recurrent layers
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0  # tokens in one step; default: 2048, on GPUs 8192
    # limit of a tenant's queued sequences, less half of the others'; further ones are refused
    max_waiting: int = 4096
    # limit of prompt tokens in the queue; an empty queue accepts a prompt of any length
    max_waiting_tokens: int = 2**23
    # GiB of images in the engine's requests, and in those on their way to it from one front end;
    # further ones are refused
    image_memory_gib: float = 8.0
    # tenants' shares of the tokens computed while requests wait; a tenant without one has weight 1
    tenant_weights: dict[str, float] = {}
    # tokens of images that one step encodes, or one larger image; default: max_num_batched_tokens
    encoder_budget: int = 0
    # tokens of images whose embeddings are kept for requests with the same image; an image may take
    # a quarter, or encoder_budget; default: 65536, or four times max_model_len if that is less
    image_cache_tokens: int = 0
    # processes, each with a GPU of its own, that encode the images; 0: the ranks do. With any,
    # encoders of other machines may join at master_addr, port master_port + 2
    encoder_workers: int = 0
    page_size: int = 16  # tokens in one KV cache page; a power of two
    num_pages: int | None = None  # KV cache pages; default: the number that fits kv_cache_gib
    # KV cache size in GiB; default: 1 on CPUs; on GPUs the memory left by gpu_memory_utilization
    kv_cache_gib: float | None = None
    gpu_memory_utilization: float = 0.9  # share of GPU memory for weights, KV cache and all else
    enable_prefix_caching: bool = True
    # copies of the states of recurrent layers, for prefix hits; default: what fits into an eighth
    # of the KV cache's memory
    num_snapshots: int | None = None
    # steps planned before their predecessors end; 1: planning waits for the previous step;
    # default: 1, on GPUs 2, in a pipeline the number of stages plus 1
    plans_in_flight: int = 0
    pipeline_parallel_size: int = 1  # pipeline stages; each stage has consecutive layers
    tensor_parallel_size: int = 1  # ranks that share each layer
    # mixture-of-experts models: each rank holds whole experts, not a slice of every expert
    enable_expert_parallel: bool = False
    assigned_layers: str | None = None  # layers of each stage (16,16,17,15); default: even cost
    # layers that a stage has memory for beside its own; with any, layers move between stages while
    # requests run, when the stages' times differ by more than a layer's for a minute
    spare_layers: int = 0
    nnodes: int = 1  # machines, with equal numbers of ranks; others run gllm_engine.worker
    master_addr: str | None = None  # address of this machine; workers on other nodes connect to it
    # port for workers; the next one is torch.distributed's, the one after it the encoders'
    master_port: int = 29500
    cluster_key_file: str | None = None  # a secret of at least 32 bytes, the same on every node
    # auto: token_throttling in a pipeline, otherwise chunked_prefill
    schedule_policy: Literal[
        "auto", "chunked_prefill", "token_throttling", "cost_throttling", "prefill_then_decode"
    ] = "auto"
    # throttling policies: steps over which the prefill backlog is spread
    prefill_drain_steps: int = 8
    min_prefill_tokens: int = 32  # throttling policies: least prefill tokens in one step
    # hosts from which images may be fetched, by exact name; an IP address may be a private one
    allowed_media_hosts: tuple[str, ...] = ()
    # directory from which file:// images may be read; default: none
    allowed_media_directory: str | None = None
    media_timeout_s: float = 10.0  # seconds to fetch one image or video
    max_images: int = 64  # images in one request
    max_image_mib: int = 32  # size of an image's file in MiB
    max_image_megapixels: int = 100  # millions of pixels that an image has before it is resized
    # pixels that an image or a frame of a video has when it is resized; default: as the checkpoint
    # says, at most that
    image_max_pixels: int | None = None
    max_videos: int = 4  # videos in one request
    max_video_mib: int = 128  # size of a video's file in MiB
    max_video_megapixels: int = 10  # millions of pixels that a frame has before it is resized
    max_video_frames: int | None = None  # frames taken of a video; default: as the checkpoint says
    video_decode_s: float = 60.0  # seconds that decoding a video may take
    # threads for tensor work; 0: OMP_NUM_THREADS, else all cores but one, which the server needs
    cpu_threads: int = 0
    drain_timeout_s: float = 30.0  # seconds that a reload waits for running requests to finish
    log_requests: bool = True
    # file for a timeline of the latest steps, written when the engine ends (Chrome trace, JSON)
    timeline: str | None = None

    def __post_init__(self) -> None:
        for key, (low, high) in _RANGES.items():
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{key}: {shown(value)} is outside [{low}, {high}]")
        _check_weights(self.tenant_weights)
        if 0 < self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens: {self.max_num_batched_tokens} is less than "
                f"max_num_seqs={self.max_num_seqs}, so not every sequence could advance in a step"
            )
        if self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size: {self.page_size} is not a power of two")
        if self.null_tokens_per_s is not None and self.device != "none":
            raise ConfigError(f"null_tokens_per_s: it is for device none, not {self.device}")
        if self.spare_layers and self.pipeline_parallel_size == 1:
            raise ConfigError(
                f"spare_layers: {self.spare_layers} is for layers that move between stages, and "
                "there is one stage (pipeline_parallel_size=1)"
            )
        if self.num_ranks % self.nnodes:
            raise ConfigError(
                f"nnodes: {self.num_ranks} ranks (pipeline_parallel_size x tensor_parallel_size) "
                f"are not shared out evenly among {self.nnodes} nodes"
            )
        self._check_other_machines()
        if self.encoder_workers and self.tensor_parallel_size > self.num_ranks // self.nnodes:
            raise ConfigError(
                f"encoder_workers: {self.encoder_workers} is for ranks of one machine, into whose "
                f"memory encoders write, and the {self.tensor_parallel_size} ranks of the first "
                f"stage (tensor_parallel_size) are on several of the {self.nnodes} (nnodes)"
            )
        if self.encoder_workers and self.device == "none":
            raise ConfigError(
                f"encoder_workers: {self.encoder_workers} is for a model that takes images, and "
                "with device=none no model runs"
            )
        self.stage_layers()
        for host in self.allowed_media_hosts:
            if not _HOST.fullmatch(host) and not _is_address(host):
                raise ConfigError(
                    f"allowed_media_hosts: {shown(repr(host))} is not a host such as "
                    "images.example.com or an IP address"
                )

    def _check_other_machines(self) -> None:
        keys = ("master_addr", "cluster_key_file")
        given = [key for key in keys if getattr(self, key) is not None]
        for key in keys:
            if key in given:
                continue
            if self.nnodes > 1:
                raise ConfigError(f"{key}: it is needed with nnodes={self.nnodes}")
            if self.encoder_workers and given:
                raise ConfigError(
                    f"{key}: it is needed with {given[0]}, for encoders of other machines"
                )
        if self.master_addr is not None and not _is_address(self.master_addr):
            raise ConfigError(
                f"master_addr: {shown(repr(self.master_addr))} is not an address of this machine "
                "such as 10.0.0.1 or fd00::1"
            )

    @property
    def num_ranks(self) -> int:
        return self.pipeline_parallel_size * self.tensor_parallel_size

    @property
    def policy(self) -> str:
        """The schedule policy, with "auto" resolved."""
        if self.schedule_policy != "auto":
            return self.schedule_policy
        return "token_throttling" if self.pipeline_parallel_size > 1 else "chunked_prefill"

    @property
    def image_bytes(self) -> int:
        """image_memory_gib in bytes."""
        return int(self.image_memory_gib * 2**30)

    @property
    def largest_image(self) -> int:
        """Most tokens of an image."""
        return min(self.image_cache_tokens, max(self.encoder_budget, self.image_cache_tokens // 4))

    @property
    def landing_tokens(self) -> int:
        """Tokens of images that encoders encode ahead: one is written while another is read."""
        return 2 * self.largest_image

    def stage_layers(self) -> tuple[int, ...] | None:
        """assigned_layers as numbers; None if it is not set. Raises ConfigError."""
        if self.assigned_layers is None:
            return None
        words = [word.strip() for word in self.assigned_layers.split(",")]
        stages = self.pipeline_parallel_size
        if len(words) != stages or not all(map(_is_count, words)):
            raise ConfigError(
                f"assigned_layers: {shown(repr(self.assigned_layers))} is not {stages} numbers "
                "above 0 with commas between, one for each stage (pipeline_parallel_size)"
            )
        return tuple(map(int, words))


def _check_weights(weights: dict[str, float]) -> None:
    if len(weights) > MAX_TENANT_WEIGHTS:
        raise ConfigError(
            f"tenant_weights: {len(weights)} tenants are named, at most {MAX_TENANT_WEIGHTS} are "
            "allowed"
        )
    for name, weight in weights.items():
        if len(name) > MAX_TENANT_CHARS or not _is_text(name):
            raise ConfigError(
                f"tenant_weights: {shown(ascii(name))} is not a text of {MAX_TENANT_CHARS} "
                "characters at most"
            )
        if name == OTHER_TENANTS:
            raise ConfigError(
                f"tenant_weights: {name!r} means all tenants without a weight, they have weight 1"
            )
        if not 0.001 <= weight <= 1000:
            raise ConfigError(
                f"tenant_weights: {shown(str(weight))} of {shown(repr(name))} is outside "
                "[0.001, 1000]"
            )


def _is_count(text: str) -> bool:
    """Whether `text` is a number from 1 to 9999."""
    return text.isdecimal() and len(text) < 5 and int(text) > 0


def _is_address(text: str) -> bool:
    """Whether `text` is the address of one machine.

    0.0.0.0 stands for every interface. Link-local addresses such as fe80::1 repeat on every link.
    """
    try:
        address = ip_address(text)
        return not (address.is_unspecified or address.version == 6 and address.is_link_local)
    except ValueError:
        return False


_HOST = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", re.ASCII)

# Tokens of the largest image to which processors of the known families reduce larger ones.
_IMAGE_TOKENS = 16384

_RANGES: dict[str, tuple[float, float]] = {
    "null_tokens_per_s": (100, 1e9),
    "max_model_len": (1, 2**24),
    "max_num_seqs": (0, 16384),
    "max_num_batched_tokens": (0, 2**20),
    "max_waiting": (1, 2**20),
    "max_waiting_tokens": (1, 2**40),
    "image_memory_gib": (0.001, 4096.0),
    "encoder_budget": (0, 2**20),
    "image_cache_tokens": (0, 2**24),
    "encoder_workers": (0, 64),
    "page_size": (1, 256),
    "num_pages": (1, 2**30),
    "num_snapshots": (0, 2**20),
    "kv_cache_gib": (0.001, 4096.0),
    "gpu_memory_utilization": (0.01, 1.0),
    "plans_in_flight": (0, 64),
    "pipeline_parallel_size": (1, 64),
    "tensor_parallel_size": (1, 64),
    "spare_layers": (0, 64),
    "nnodes": (1, 64),
    "master_port": (1, 65533),
    "prefill_drain_steps": (1, 1024),
    "min_prefill_tokens": (1, 2**20),
    "media_timeout_s": (0.1, 600.0),
    "max_images": (1, 4096),
    "max_image_mib": (1, 1024),
    "max_image_megapixels": (1, 1024),
    "image_max_pixels": (1, 2**30),
    "max_videos": (1, 1024),
    "max_video_mib": (1, 4096),
    "max_video_megapixels": (1, 64),
    "max_video_frames": (2, 2**16),
    "video_decode_s": (0.1, 3600.0),
    "cpu_threads": (0, 1024),
    "drain_timeout_s": (0.0, 3600.0),
}


def settle(config: EngineConfig, gpu_memory: int | None, state_bytes: int) -> EngineConfig:
    """A copy in which every 0 that means "default" is replaced by the device's default.

    `gpu_memory`: bytes of each GPU; None: the model runs on a CPU. `state_bytes`: of the states
    that each sequence in a step has in all layers; 0 if layers keep none.
    """
    on_gpu = gpu_memory is not None
    sequences = 1024 if on_gpu else 256
    if gpu_memory is not None and state_bytes:
        sequences = min(sequences, _states_in(gpu_memory, state_bytes, config))
    elif state_bytes:
        sequences //= 4  # a state may take as much memory as the K and V of thousands of tokens
    tokens = config.max_num_batched_tokens or (8192 if on_gpu else 2048)
    tokens = max(tokens, config.max_num_seqs)
    budget = config.encoder_budget or tokens
    images = 4 * min(_IMAGE_TOKENS, config.max_model_len or _IMAGE_TOKENS)
    stages = config.pipeline_parallel_size
    depth = stages + 1 if on_gpu or stages > 1 else 1
    return msgspec.structs.replace(
        config,
        max_num_batched_tokens=tokens,
        max_num_seqs=config.max_num_seqs or min(tokens, sequences),
        plans_in_flight=config.plans_in_flight or depth,
        encoder_budget=budget,
        image_cache_tokens=config.image_cache_tokens or max(budget, images),
    )


def _states_in(gpu_memory: int, state_bytes: int, config: EngineConfig) -> int:
    """How many sequences have their states in a quarter of each GPU; a power of two."""
    ranks = config.pipeline_parallel_size * config.tensor_parallel_size
    copies = 2 if config.spare_layers else 1  # a move of layers copies all states
    states = gpu_memory // 4 * ranks // (state_bytes * copies)
    return 1 << max(0, states.bit_length() - 1)


def make_config(values: dict[str, Any], directory: Path | None = None) -> EngineConfig:
    """Validate `values` (model.json, CLI flags). Relative paths are relative to `directory`.

    Raises ConfigError for an unknown key, a wrong type, a value out of range or a missing model.
    """
    unknown = sorted(set(values) - set(EngineConfig.__struct_fields__))
    if unknown:
        known = ", ".join(EngineConfig.__struct_fields__)
        raise ConfigError(f"unknown key {shown(repr(unknown[0]))}; known keys are {known}")
    for key, value in values.items():
        if isinstance(value, str) and not _is_text(value):
            raise ConfigError(f"{key}: {shown(value)} holds a lone surrogate")
    values = dict(values)
    for key in ("model", *PATH_KEYS):
        if isinstance(values.get(key), str):
            values[key] = _resolve(key, (directory or Path()) / values[key])
    try:
        config = msgspec.convert(values, EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(shown(str(error).replace("`", ""), most=500)) from None
    for key in ("model", "allowed_media_directory"):
        path = getattr(config, key)
        if path is not None and not os.path.isdir(path):
            raise ConfigError(f"{key}: {shown(path, most=500)} is not a directory")
    return config


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _resolve(key: str, path: Path) -> str:
    try:
        return str(path.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or an invalid name
        raise ConfigError(f"{key}: {shown(str(path))} is no path ({error})") from None


def read_config(path: Path) -> EngineConfig:
    """Read model.json. Relative paths in it are relative to its directory.

    Raises ConfigError, whose message names the file.
    """
    values = read_object(path, ConfigError)
    try:
        return make_config(values, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
