"""A tritonserver for a benchmark, with one model and free ports; it is stopped at the end.

This module owns the server's model repository, and makes a tokenizer for models without one. It
knows nothing of load.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from select import select
from typing import Any, NamedTuple

from gllm_benchmarks.record import exit_on_sigterm
from gllm_client import read_metrics
from gllm_client.supervisor import descendants, write_model

SHIPPED = Path(__file__).resolve().parents[1] / "model_repository/shakespeare/1"
MODEL = "m"  # the model's name on the server
START_S = 300.0
# Keys of config.json that name a token, and the token's text. The first three are of an image.
SPECIAL = {
    "vision_start_token_id": "<|vision_start|>",
    "image_token_id": "<|image_pad|>",
    "vision_end_token_id": "<|vision_end|>",
    "video_token_id": "<|video_pad|>",
}


# Parts of the system, by a word in the command lines of their processes; the first one counts.
PARTS = ("openai\0", "backend_stub", "gllm_engine", "tritonserver")


class Addresses(NamedTuple):
    """host:port of a server's gRPC, of its metrics, and of its OpenAI server if that is started."""

    grpc: str
    metrics: str
    openai: str


def serve_command(repository: Path, gateways: int = 0) -> tuple[list[str], Addresses]:
    """The command that serves a repository on free ports, and where.

    `gateways`: processes of its OpenAI server; 0: it has none.
    """
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    http, grpc, metrics, openai = (one.getsockname()[1] for one in sockets)
    for one in sockets:
        one.close()
    command = [sys.executable, "-m", "gllm_client", "serve", str(repository)]
    command += [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
    if gateways:
        command += [f"--openai-port={openai}", f"--processes={gateways}"]
    return command, Addresses(*(f"127.0.0.1:{port}" for port in (grpc, metrics, openai)))


def await_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the line that says so. Raises SystemExit with the log if there is none in START_S.

    `process`: serve_command's, with a pipe for its output.
    """
    ready, _, _ = select([process.stdout], [], [], START_S)
    if not ready or not process.stdout.readline():  # no line: the server has ended
        raise SystemExit(f"tritonserver did not become ready:\n{log.read_text()}")


@contextlib.contextmanager
def server(
    model: Path,
    front_ends: int,
    parameters: dict[str, str],
    config: dict[str, Any],
    gateways: int = 0,
) -> Iterator[Addresses]:
    """Run `gllm serve` with `model` as MODEL; yields its addresses.

    `parameters`: parameters in config.pbtxt. `config`: keys of model.json. `gateways`: see
    serve_command. A model without a tokenizer gets a generated one. From now on SIGTERM ends this
    process like an error, which ends the server too. Raises SystemExit with the server's log if
    it is not ready after START_S.
    """
    exit_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="gllm-bench-") as directory:
        repository = Path(directory, "repository")
        write_repository(repository / MODEL, model.resolve(), front_ends, parameters, config)
        command, addresses = serve_command(repository, gateways)
        log = Path(directory, "log")
        with (
            log.open("w") as file,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file) as process,
        ):  # leaving the block waits for its end; it kills a server that does not stop
            try:
                await_ready(process, log)
                yield addresses
            finally:
                process.terminate()


def write_repository(
    directory: Path,
    model: Path,
    front_ends: int,
    parameters: dict[str, str],
    config: dict[str, Any],
) -> None:
    """Write one model's files: config.pbtxt and 1/model.json."""
    has_tokenizer = (model / "tokenizer.json").is_file() or "tokenizer" in config
    made_up = {} if has_tokenizer else {"tokenizer": "."}
    write_model(directory, {"model": str(model)} | made_up | config, front_ends)
    if made_up:
        write_tokenizer(model, directory / "1")
    with (directory / "config.pbtxt").open("a") as file:
        for key, value in parameters.items():
            file.write(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n')


def read_settings(model: Path) -> dict[str, Any]:
    """A model's config.json, with what it has in text_config beside the rest."""
    config = json.loads((model / "config.json").read_text())
    return config | config.get("text_config", {})


def read_vocab(model: Path) -> tuple[int, dict[int, str]]:
    """The size of a model's vocabulary, and its tokens that are in SPECIAL, in that order."""
    settings = read_settings(model)
    special = {settings[key]: text for key, text in SPECIAL.items() if key in settings}
    return settings["vocab_size"], special


def write_tokenizer(model: Path, directory: Path) -> None:
    """Write a tokenizer in which every token is a short word, so that text has a realistic cost."""
    vocab, special = read_vocab(model)
    whole = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": id, "content": text, "special": True} | whole for id, text in special.items()]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "use_regex": True,
        "trim_offsets": True,
    }
    # U+0120 stands for a space.
    words = {special.get(id, f"\u0120{id:x}"): id for id in range(vocab)}
    spelling = {"type": "BPE", "vocab": words, "merges": []}
    both = {"pre_tokenizer": byte_level, "decoder": byte_level}
    about = {"version": "1.0", "added_tokens": added, "model": spelling} | both
    (directory / "tokenizer.json").write_text(json.dumps(about))


def metric_sums(metrics: str, *wanted: tuple[str, ...]) -> list[float]:
    """Of each in `wanted`: the sum of the samples with all its texts in their names and labels.

    `metrics`: a server's, as host:port.
    """
    samples = read_metrics(metrics, timeout=60).items()
    return [
        sum(value for key, value in samples if all(text in key for text in texts))
        for texts in wanted
    ]


def cpu_seconds() -> Counter[str]:
    """CPU time so far by PARTS; "clients" are all processes that have ended, with their start."""
    spent = Counter(clients=sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]))
    for pid, *_ in descendants(os.getpid()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended just now
            command = Path(f"/proc/{pid}/cmdline").read_text()
            times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            part = next(filter(command.__contains__, PARTS), "others").strip("\0")
            spent[part] += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return spent
