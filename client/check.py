"""`gllm check`: shows what a start of a model would take, or why it would be refused.

Owns the texts; gllm_engine checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from gllm_client.flags import UsageError
from gllm_client.protocol import shown
from gllm_engine import CheckReport, EngineConfig, check_model

_UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_DEVICES = {"hopper": "Hopper", "gpu": "other GPUs", "cpu": "CPU"}


class NotServable(RuntimeError):
    """A start of the model would fail; the message is the one of the start."""


def check(config: EngineConfig, gpu_memory: str | None = None, as_json: bool = False) -> int:
    """Print a report and return 0. `gpu_memory`: as a flag says it.

    For a model that would not start, prints that in JSON and returns 1, or raises NotServable.
    Raises UsageError for a wrong `gpu_memory`.
    """
    size = None if gpu_memory is None else num_bytes(gpu_memory)
    try:
        report = check_model(config, size)
    except (ValueError, OSError) as error:  # ValueError: the base class of all refusals
        if not as_json:
            raise NotServable(str(error)) from error
        print(msgspec.json.encode({"loads": False, "problem": str(error)}).decode())
        return 1
    if as_json:
        print(msgspec.json.encode({"loads": True} | msgspec.structs.asdict(report)).decode())
    else:
        print("\n".join(lines(report)))
    return 0


def num_bytes(text: str) -> int:
    """The size that a text such as 80GiB names, at most 1024 TiB. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([A-Za-z]+)", text, re.ASCII)
    if found is None or found[2] not in _UNITS:
        units = ", ".join(_UNITS)
        raise UsageError(f"--gpu-memory: {shown(text)} is not a number and a unit ({units})")
    size = int(float(found[1]) * _UNITS[found[2]])
    if not 2**20 <= size <= 2**50:
        raise UsageError(f"--gpu-memory: {shown(text)} is outside [1MiB, 1024TiB]")
    return size


def lines(report: CheckReport) -> Iterator[str]:
    """The report for people."""
    device = "a CPU"
    if report.gpu_memory is not None:
        device = f"GPUs of {_gib(report.gpu_memory)} GiB"
    yield f"{report.model}: loads"
    yield (
        f"{report.num_params / 1e9:.2f} billion parameters in {report.dtype}, KV cache in "
        f"{report.kv_cache_dtype}, on {device}"
    )
    yield ""
    yield from _memory_lines(report)
    yield ""
    yield from _cache_lines(report)
    yield ""
    yield from _kernel_lines(report)


def _memory_lines(report: CheckReport) -> Iterator[str]:
    stages = report.stages
    table = [
        ["GiB of each rank", *(f"stage {number}" for number in range(len(stages)))],
        ["layers", *(f"{stage.first_layer}-{stage.last_layer}" for stage in stages)],
        ["ranks", *(str(stage.ranks) for stage in stages)],
    ]
    for kind in dict.fromkeys(kind for stage in stages for kind in stage.weights):
        table.append([f"weights: {kind}", *(_gib(s.weights.get(kind, 0)) for s in stages)])
    total = [sum(stage.weights.values()) for stage in stages]
    table.append(["weights", *map(_gib, total)])
    table.append(["tables of angles", *(_gib(stage.tables) for stage in stages)])
    if report.gpu_memory is not None:
        table.append(["driver (estimate)", *(_gib(stage.driver) for stage in stages)])
        if report.encoder is not None:
            table.append(["encoders (estimate)", *(_gib(stage.encoders) for stage in stages)])
        table.append(["a step (estimate)", *(_gib(stage.step) for stage in stages)])
    if any(stage.states + stage.snapshots for stage in stages):
        table.append(["states of sequences", *(_gib(stage.states) for stage in stages)])
        table.append(["snapshots of states", *(_gib(stage.snapshots) for stage in stages)])
    table.append(["KV cache", *(_gib(stage.kv_cache) for stage in stages)])
    if report.gpu_memory is not None:
        table.append(["left free", *(_gib(stage.free or 0) for stage in stages)])
    yield from _aligned(table)
    yield from _encoder_lines(report)
    if report.cut_is_estimated:
        yield "A start measures which layers each stage gets; here they are cut by their bytes."


def _encoder_lines(report: CheckReport) -> Iterator[str]:
    encoder = report.encoder
    if encoder is None:
        return
    table = [["GiB of each encoder", ""], ["encoders", str(encoder.encoders)]]
    table.append(["weights: vision tower", _gib(encoder.weights)])
    if encoder.free is not None:
        table.append(["driver (estimate)", _gib(encoder.driver)])
        table.append(["the largest image (estimate)", _gib(encoder.step)])
        table.append(["left free", _gib(encoder.free)])
    yield ""
    yield from _aligned(table)


def _cache_lines(report: CheckReport) -> Iterator[str]:
    yield (
        f"KV cache: {report.num_pages} pages of {report.page_size} tokens, "
        f"{report.cached_tokens} tokens; {report.sequences} sequences of {report.max_model_len} "
        "tokens (max_model_len) fit at once"
    )
    for group in report.groups:
        what = f"{group.layers} layers" if group.layers else "token ids only"
        sees = "all tokens" if group.window is None else f"a window of {group.window} tokens"
        yield f"  {what} with {sees}: {group.pages} pages for such a sequence"
    if report.num_snapshots:
        yield f"  {report.num_snapshots} snapshots of states"


def _kernel_lines(report: CheckReport) -> Iterator[str]:
    yield "kernels"
    for use in report.kernels:
        yield f"  {use.part} ({use.layers} layers)"
        devices: dict[str, list[str]] = {}
        for key, text in use.kernels.items():
            devices.setdefault(text, []).append(_DEVICES[key])
        for text, names in devices.items():
            yield f"    {', '.join(names)}: {text}"


def _aligned(table: list[list[str]]) -> Iterator[str]:
    """The rows as lines; the first column is as wide as its longest text, numbers end together."""
    first = max(len(row[0]) for row in table)
    widths = [max(len(row[i]) for row in table) for i in range(1, len(table[0]))]
    for name, *cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        yield "  ".join([name.ljust(first), *padded])


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
