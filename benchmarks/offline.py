"""Measures an engine with all requests queued at once: scripts/bench offline --model NAME.

Runs workloads of workloads.py on random weights of the model's shape (only config.json is read),
at temperature 1, without prefix cache, each output at its full length. The engine is ours, vLLM, or
both in turn, each in a separate process. Of our engine only: with --profile it also prints the GPU
time of a step by kind of kernel, with --timeline the shares of each rank's time in the last run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from msgspec import convert

from gllm_benchmarks.record import (
    Figures,
    exit_on_sigterm,
    make_parser,
    number,
    print_table,
    record,
    told,
)
from gllm_benchmarks.served_model import read_settings, read_vocab, write_tokenizer
from gllm_benchmarks.workloads import WORKLOADS, lengths, make_jobs, warm_up, with_images
from gllm_engine import Summary

MODELS = Path(__file__).parent / "models"
KNOWN = ", ".join(sorted(path.name for path in MODELS.iterdir()))
OURS = {"load_format": "dummy", "enable_prefix_caching": False}
VLLM = {
    "load_format": "dummy",
    "enable_prefix_caching": False,
    "dtype": "bfloat16",
    "skip_tokenizer_init": True,
    "generation_config": "vllm",  # read only config.json of the model's directory
    "max_num_seqs": 1024,
    "gpu_memory_utilization": 0.9,
}
# For a model that takes images, whose places vLLM finds by the tokenizer. Every image is processed
# anew, as by our engine.
VLLM_IMAGES = {"skip_tokenizer_init": False, "mm_processor_cache_gb": 0}
# For such a model whose prompts have no images: vLLM loads no vision tower.
VLLM_TEXT = {"language_model_only": True}
VLLM_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
# DeepSeek's kinds of routing: vLLM's random weights are so small that scores differ by less than
# bfloat16 or the random bias tells, so all tokens would choose the same experts.
EVEN_ROUTING = {"VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random"}
# Keys of --config that go to both engines; other keys go to our engine only.
SHARED = (
    "gpu_memory_utilization",
    "max_model_len",
    "max_num_seqs",
    "pipeline_parallel_size",
    "tensor_parallel_size",
    "enable_expert_parallel",
)
HEADER = ["workload", "engine", "s", "out tok/s", "tok/s", "ms/token", "first ms", "steps"]


def model_directory(model: str) -> Path:
    """`model` as a directory, or as a name in MODELS. Raises SystemExit with a sentence."""
    for path in (Path(model), MODELS / model):
        if (path / "config.json").is_file():
            return path.resolve()
    raise SystemExit(f"--model: {model} has no config.json, and is none of {KNOWN}")


def parse_pairs(pairs: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE pairs; a value that is not valid JSON is text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            raise SystemExit(f"{pair!r} is not KEY=VALUE")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values


def configure(engine: str, ours: dict[str, Any], peer: dict[str, Any], longest: int) -> Any:
    """An engine's configuration. `longest`: most tokens of a prompt plus its output."""
    if engine == "ours":
        return OURS | ours
    shared = {key: ours[key] for key in SHARED if key in ours}
    return VLLM | {"max_model_len": -(-longest // 1024) * 1024} | shared | peer


def with_tokenizer(model: Path, copy: Path) -> Path:
    """Copy a model's settings, with a tokenizer that is made up, to a new directory."""
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    write_tokenizer(model, copy)
    return copy


def drive(engine: str, task: dict[str, Any], peer_site: Path | None, timeout: float) -> Any:
    """Run one engine in a child process and return its figures.

    Raises SystemExit if the engine fails or takes longer than `timeout` seconds. The child process
    and its children have ended on return.
    """
    environment = dict(os.environ)
    driver = ["-m", "gllm_benchmarks.ours"]
    if engine == "vllm":
        environment |= VLLM_ENVIRONMENT | {"PYTHONPATH": str(peer_site)}
        if "n_routed_experts" in read_settings(Path(task["model"])):
            environment |= EVEN_ROUTING
        driver = [str(Path(__file__).with_name("peer.py"))]
    figures = Path(task["figures"])
    figures.unlink(missing_ok=True)
    task = task | {"started": time.monotonic()}  # all processes share this clock
    command = [sys.executable, *driver, json.dumps(task)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{engine}: not done after {timeout:g} s") from None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # with its remaining child processes
        except ProcessLookupError:
            pass
        process.wait()
    if status or not figures.is_file():
        raise SystemExit(f"{engine}: its process ended with status {status} and no figures")
    return json.loads(figures.read_text())


def summarize(runs: list[Figures]) -> Figures:
    """The run with the median time (of two runs, the slower one), and the times of all runs."""
    times = [run["seconds"] for run in runs]
    middle = statistics.median_high(times)
    return runs[times.index(middle)] | {"all_seconds": times}


def make_rows(names: list[str], figures: Figures) -> list[list[Any]]:
    """One row of HEADER per workload and engine; with two engines, also our speed by vLLM's."""
    rows = []
    for name in ["start", *names]:
        works = name != "start"
        seconds = {e: f[name]["seconds"] if works else f["start_s"] for e, f in figures.items()}
        for engine, about in figures.items():
            row = [name, engine, f"{seconds[engine]:.2f}"]
            row += describe(name, about[name]) if works else [""] * 5
            if len(figures) == 2:
                row.append(f"{seconds['vllm'] / seconds['ours']:.3f}" if engine == "ours" else "")
            rows.append(row)
    return rows


def describe(workload: str, run: Figures) -> list[str]:
    """Cells of HEADER from the speeds on. Latency is given if all requests run as one batch."""
    seconds = run["seconds"]
    prompt_lens, output_lens = zip(*lengths(workload), strict=True)
    together = len(output_lens) <= 64 and len(set(output_lens)) == 1
    return [
        f"{run['tokens'] / seconds:,.0f}",
        f"{(run['tokens'] + sum(prompt_lens)) / seconds:,.0f}",
        f"{1000 * seconds / output_lens[0]:.2f}" if together else "",
        "" if run["first_token"] is None else f"{1000 * run['first_token']:.0f}",
        "" if run["steps"] is None else f"{run['steps']:.0f}",
    ]


def print_summary(title: str, summary: dict[str, Any]) -> None:
    """Print the tables of a timeline; `summary`: the fields of a Summary."""
    for header, *rows in convert(summary, Summary).tables():
        print_table(title, header, rows)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("offline", __doc__)
    add = parser.add_argument
    add("--model", required=True, help=f"a directory with a config.json, or {KNOWN}")
    add("--engine", choices=("ours", "vllm", "both"), default="ours")
    add("--peer-site", type=Path, help="a directory with vLLM's packages")
    add("--workloads", default=",".join(WORKLOADS), help="also fixed:COUNT:IN:OUT, image, image1")
    add("--repeat", type=number(int, 1, 1000), default=1, help="runs of each; the median is told")
    pairs: dict[str, Any] = {"action": "append", "default": [], "metavar": "KEY=VALUE"}
    add("--config", **pairs, help=f"of our engine; {', '.join(SHARED)} of vLLM too")
    add("--peer-config", **pairs)
    add("--profile", action="store_true")
    add("--timeline", type=Path, help="a file for a Chrome trace of the latest steps")
    add("--timeout", type=number(float, 1, 1e6), default=1800, help="seconds for one engine")
    arguments = parser.parse_args()
    if arguments.engine != "ours" and not (arguments.peer_site or Path()).joinpath("vllm").is_dir():
        parser.error("--peer-site: a directory in which there is vllm is needed for this engine")
    if arguments.timeline and arguments.engine == "vllm":
        parser.error("--timeline: it is of our engine")
    return arguments


@told()
def main() -> None:
    arguments = parse_arguments()
    exit_on_sigterm()
    model = model_directory(arguments.model)
    ours = parse_pairs(arguments.config)
    peer = parse_pairs(arguments.peer_config)
    vocab, special = read_vocab(model)
    work = []
    names = arguments.workloads.split(",")
    for name in names:
        jobs = with_images(make_jobs(lengths(name), vocab), name, special)
        work.append({"name": name, "warm_up": warm_up(jobs), "jobs": jobs})
    every = [job for each in work for job in each["jobs"]]
    longest = max(job.prompt_len + job.output_len for job in every)
    pictured = any(job.images for job in every)
    if special:
        peer = (VLLM_IMAGES if pictured else VLLM_TEXT) | peer
    figures: Figures = {}
    failure: SystemExit | None = None
    with tempfile.TemporaryDirectory(prefix="gllm-bench-") as directory:
        paths = {key: str(Path(directory, key)) for key in ("work", "figures")}
        Path(paths["work"]).write_text(json.dumps(work))
        for engine in ("ours", "vllm") if arguments.engine == "both" else (arguments.engine,):
            config = configure(engine, ours, peer, longest)
            task = {"model": str(model), "vocab": vocab, "config": config, **paths}
            task |= {"repeat": arguments.repeat, "profile": arguments.profile}
            if engine == "vllm" and pictured:
                task["model"] = str(with_tokenizer(model, Path(directory, model.name)))
            if engine == "ours" and arguments.timeline:
                config["timeline"] = str(arguments.timeline.resolve())
            try:
                found = drive(engine, task, arguments.peer_site, arguments.timeout)
            except SystemExit as error:
                failure = error
                continue
            for each in work:
                found[each["name"]] = summarize(found[each["name"]])
            figures[engine] = {"config": config, **found}
    if failure and not figures:
        raise failure
    header = [*HEADER, "ours / vllm"] if len(figures) == 2 else HEADER
    print_table(model.name, header, make_rows(names, figures))
    for each in work if arguments.timeline and "ours" in figures else []:
        name = f"{each['name']} timeline"
        print_summary(name, figures["ours"][name])
    record(arguments, f"offline-{model.name}", figures)
    if failure:
        raise failure


if __name__ == "__main__":
    main()
