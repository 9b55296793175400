"""How long a cold start takes: scripts/bench start --model NAME.

Writes a checkpoint of the model's shape, random weights in bfloat16, and starts our engine on it
several times, each in a process of its own: from the spawn of the process until it takes requests.
The first start may have kernels to compile; later ones find them, and the files in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gllm_benchmarks.offline import drive, model_directory, parse_pairs
from gllm_benchmarks.record import add_arguments, print_table, record
from gllm_engine.spec import read_spec
from gllm_engine.spec.names import checkpoint_tensors

_FILE_BYTES = 4 << 30


def write_checkpoint(model: Path, directory: Path) -> int:
    """config.json of `model` and weights made up for it, in `directory`; bytes of the weights."""
    shutil.copy(model / "config.json", directory)
    spec = read_spec(directory)
    shapes = spec.weights()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight_map: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(held, directory / name)
        weight_map.update(dict.fromkeys(held, name))
        held.clear()

    for name, weights in checkpoint_tensors(spec).items():
        rows = sum(shapes[weight][0] for weight in weights)
        tensor = torch.empty(rows, *shapes[weights[0]][1:], dtype=torch.bfloat16, device=device)
        is_norm = name.endswith("norm.weight")
        held[name] = (tensor.uniform_(0.5, 1.5) if is_norm else tensor.normal_(0, 0.02)).cpu()
        total += tensor.nbytes
        if sum(each.nbytes for each in held.values()) >= _FILE_BYTES:
            flush()
    if held:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench start", description=__doc__)
    parser.add_argument("--model", required=True, help="as for scripts/bench offline")
    parser.add_argument("--repeat", type=int, default=3, help="starts, one after the other")
    parser.add_argument("--config", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--directory", type=Path, help="where the checkpoint is put for a while")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one start")
    add_arguments(parser)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    model, starts = model_directory(arguments.model), []
    job = ([1] * 100, 8)
    work = [{"name": "first request", "warm_up": [job], "jobs": [job]}]
    with tempfile.TemporaryDirectory(prefix="gllm-start-", dir=arguments.directory) as directory:
        num_bytes = write_checkpoint(model, Path(directory))
        paths = {key: str(Path(directory, f"{key}.json")) for key in ("work", "figures")}
        Path(paths["work"]).write_text(json.dumps(work))
        config = parse_pairs(arguments.config)
        task = {"model": directory, "config": config, "repeat": 1, "profile": False, **paths}
        for _ in range(arguments.repeat):
            starts.append(drive("ours", task, None, arguments.timeout)["start_s"])
    figures = {"checkpoint_gb": num_bytes / 1e9, "config": config, "start_s": starts}
    rows = [[number, f"{seconds:.1f}"] for number, seconds in enumerate(starts, 1)]
    print_table(f"{model.name}, {num_bytes / 1e9:.2f} GB of weights", ["start", "s"], rows)
    record(f"start-{model.name}", figures, arguments.save)


if __name__ == "__main__":
    main()
